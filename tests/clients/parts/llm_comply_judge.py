"""llm-comply: bodies and streams against the specifications of three protocols."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.clients.parts.checks import BASE_URL, MODEL, program, report

FORMAT = os.environ["FORMAT"]
TRIES = 3
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
        test, tries = found, 1
        # Its answers are sampled at temperature 1 without a bound: a small model now and then does
        # not end, and after a time-out the judge's connection is of no use to the tests behind.
        while test["status"] == "failed" and found["id"] not in DOES_NOT_APPLY and tries < TRIES:
            test, tries = judged("--filter", found["id"])[0], tries + 1
        name, status = test["id"], test["status"]
        detail = "; ".join(test.get("errors", []) or test.get("warnings", []))
        if tries > 1 and status == "passed":
            detail = f"at try {tries}, since answers are sampled; {detail}".rstrip("; ")
        if name in DOES_NOT_APPLY and status != "passed":
            report(name, "skipped", DOES_NOT_APPLY[name])
        else:
            report(name, status, detail, test.get("duration_ms", 0) / 1000)


main()
