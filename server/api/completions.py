"""POST /v1/completions: the route, and the form of its answers."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from offramp.server.api.context import Shared
from offramp.server.api.generation import Delta
from offramp.server.api.logprobs import ScoredToken, TokenNames, completion_logprobs
from offramp.server.api.prepared import prepare_completion
from offramp.server.api.reply import respond
from offramp.server.api.schemas import CompletionBody

router = APIRouter(tags=["Completions"])


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionBody, request: Request, context: Shared) -> Response:
    """Continue one or several prompts."""
    prepared = await prepare_completion(context, body)
    return await respond(request, context, body, prepared, CompletionShape())


class CompletionShape:
    """Objects of a continuation."""

    id_prefix: ClassVar[str] = "cmpl-"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def choice(self, deltas: Sequence[Delta]) -> Mapping[str, Any]:
        """Plain text."""
        return {"text": "".join(delta.text for delta in deltas)}

    def delta(self, delta: Delta, *, first: bool) -> Mapping[str, Any]:
        """Plain text."""
        del first
        return {"text": delta.text}

    def logprobs(
        self, names: TokenNames, scored: Sequence[ScoredToken], top: int
    ) -> Mapping[str, Any]:
        """Lists with an entry for each token."""
        return completion_logprobs(names, scored, top)
