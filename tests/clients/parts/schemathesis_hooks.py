"""Generated requests made cheap: they name the served model and ask for a few tokens."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

MODEL = os.environ["MODEL"]
# Fields that make one answer many, and how many stay.
LIMITS = {"n": 2, "best_of": 2, "permutations": 2, "min_tokens": 2}
TOKENS = 4
# The shortest answer of /v1/responses that OpenAI's document allows.
RESPONSE_TOKENS = 16


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """A body that costs little; what is no object stays as it is."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    path = context.operation.path
    if body.get("model") is None or isinstance(body["model"], str):
        body["model"] = MODEL
    for name, limit in LIMITS.items():
        if isinstance(body.get(name), int | float) and body[name] > limit:
            body[name] = limit
    if path.endswith("/responses"):
        body["max_output_tokens"] = RESPONSE_TOKENS
    elif path.endswith(("/completions", "/messages")):
        body.pop("max_completion_tokens", None)
        body["max_tokens"] = TOKENS
    return body
