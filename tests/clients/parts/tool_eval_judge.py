"""tool-eval-bench: fifteen conversations with tools.

Its points measure the model, which is small; what must hold is that no request is refused and that
every answer can be read.
"""

from __future__ import annotations

import json

from tests.clients.parts.checks import MODEL, ORIGIN, WORK, program, report

SERVER_FAULTS = {"connection_error", "server_error", "timeout"}


def main() -> None:
    """Report each scenario, and the points."""
    target = WORK / "report.json"
    options = {
        "base-url": ORIGIN,
        "model": MODEL,
        "api-key": "none",
        "json-file": str(target),
        "output-dir": str(WORK / "runs"),
        "max-turns": "2",
        "timeout": "60",
        "backend-kwargs": json.dumps({"max_tokens": 128}),
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    done = program("tool-eval-bench", "--short", "--no-live", *words)
    if not target.exists():
        raise SystemExit(done.stderr[-400:])
    scores = json.loads(target.read_text(encoding="utf-8"))["scores"]
    for result in scores["scenario_results"]:
        summary = result.get("summary", "")
        fault = result.get("failure_kind") in SERVER_FAULTS
        report(result["scenario_id"], "failed" if fault else "passed", summary if fault else "")
    report("points of the model", "score", f"{scores['final_score']} of 100")


main()
