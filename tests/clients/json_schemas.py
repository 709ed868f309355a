"""Answers held to schemas of a folder, such as JSONSchemaBench's: how many are kept to.

``python -m tests.clients.json_schemas FOLDER --url http://127.0.0.1:8000/v1`` draws schemas
(``*.json``, anywhere in the folder) with a fixed seed, asks for an object of each, and checks
finished answers with the jsonschema library, which has to be installed (`make test-clients` puts it
into .venv-clients/schemathesis). Prints JSON: counts, and each schema refused or not kept to.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

QUESTION = "Give an example of such a JSON object, short."
SEED = 0


def main(words: Sequence[str] | None = None) -> int:
    """Ask and judge; the exit status is 1 where an answer does not keep to its schema."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=300)
    args = parser.parse_args(words)
    paths = sorted(args.folder.rglob("*.json"))
    drawn = random.Random(SEED).sample(paths, min(args.count, len(paths)))
    begun = time.monotonic()
    with ThreadPoolExecutor(args.concurrency) as workers:
        found = list(workers.map(lambda path: _ask(args, path), drawn))
    report = {
        "schemas": len(drawn),
        "outcomes": Counter(outcome for outcome, _ in found),
        "seconds": round(time.monotonic() - begun, 1),
        "faults": [
            {"schema": str(path.relative_to(args.folder)), "outcome": outcome, "detail": detail}
            for path, (outcome, detail) in zip(drawn, found, strict=True)
            if detail
        ],
    }
    json.dump(report, sys.stdout, indent=1)
    print()
    return 1 if any(outcome in {"invalid", "error"} for outcome, _ in found) else 0


def _ask(args: argparse.Namespace, path: Path) -> tuple[str, str]:
    """What came of one schema, and why if that is no valid answer."""
    schema = json.loads(path.read_text(encoding="utf-8"))
    body = {
        "model": args.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0.7,
        "seed": 1,
        "max_tokens": args.max_tokens,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        },
    }
    request = urllib.request.Request(
        f"{args.url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            (choice,) = json.load(response)["choices"]
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")[:300]
        return ("refused" if error.code == 400 else "error"), detail
    if choice["finish_reason"] == "length":
        return "cut off", ""
    return _judge(schema, choice["message"]["content"])


def _judge(schema: Any, text: str) -> tuple[str, str]:
    # Only this script needs the library, which is not among the project's own.
    import jsonschema  # noqa: PLC0415

    try:
        answer = json.loads(text)
    except ValueError:
        return "invalid", f"no JSON: {text[:200]}"
    newest = jsonschema.Draft202012Validator
    validator = jsonschema.validators.validator_for(schema, default=newest)(schema)
    error = next(validator.iter_errors(answer), None)
    return ("valid", "") if error is None else ("invalid", f"{error.message[:200]} in {text[:100]}")


if __name__ == "__main__":
    sys.exit(main())
