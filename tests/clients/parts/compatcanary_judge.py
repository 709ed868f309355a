"""compatcanary: seven probes of chat completions and Responses."""

from __future__ import annotations

import json

from tests.clients.parts.checks import BASE_URL, MODEL, program, report

OUTCOMES = {"pass": "passed", "warn": "passed", "fail": "failed"}


def main() -> None:
    """Report its probes, and its score."""
    words = ("--base-url", BASE_URL, "--model", MODEL, "--profile", "modern", "--format", "json")
    done = program("compatcanary", "scan", *words, OPENAI_API_KEY="none")
    found = json.loads(done.stdout)
    for probe in found["results"]:
        body = probe.get("error", {}).get("responseBody", "")
        detail = f"{probe['summary']} {body}".strip()
        report(probe["id"], OUTCOMES[probe["status"]], detail, probe.get("durationMs", 0) / 1000)
    report("score", "score", f"{found['score']} of 100")


main()
