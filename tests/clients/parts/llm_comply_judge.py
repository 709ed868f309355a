"""llm-comply: bodies and streams against the specifications of three protocols."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.clients.parts.checks import BASE_URL, MODEL, program, report

FORMAT = os.environ["FORMAT"]
# What it cannot know of the model.
DOES_NOT_APPLY = {
    "chat-image-input": "the model reads no images",
    "image-input": "the model reads no images",
    "anth-image-input": "the model reads no images",
}


def judged(*words: str) -> list[dict[str, Any]]:
    """Results of a run of it."""
    options = ("-u", BASE_URL, "-k", "none", "-m", MODEL, "--json", "--timeout", "30")
    done = program("llm-comply", "--format", FORMAT, *options, *words)
    return list(json.loads(done.stdout)["results"])


def main() -> None:
    """Report each of its tests."""
    for found in judged():
        test = found
        # After a request that timed out its connection is of no use to the tests that follow.
        if "Request-sent" in " ".join(test.get("errors", [])):
            test = judged("--filter", test["id"])[0]
        name, status = test["id"], test["status"]
        detail = "; ".join(test.get("errors", []) or test.get("warnings", []))
        if name in DOES_NOT_APPLY and status != "passed":
            report(name, "skipped", DOES_NOT_APPLY[name])
        else:
            report(name, status, detail, test.get("duration_ms", 0) / 1000)


main()
