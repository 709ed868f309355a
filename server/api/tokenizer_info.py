"""GET /tokenizer_info, in vLLM's form: what a client needs to format prompts itself."""

from typing import Any

from fastapi import APIRouter

from offramp.server.api.context import Shared

router = APIRouter(tags=["Tokenizer"])


@router.get("/tokenizer_info")
async def show_tokenizer(context: Shared) -> dict[str, Any]:
    """Settings, special tokens and chat template of the tokenizer."""
    info = context.loaded_tokenizer().info
    context_length = context.driver.info.max_model_len
    own = info.get("model_max_length", context_length)
    # A tokenizer that knows of no limit has one of 10^30.
    return {**info, "model_max_length": min(own, context_length)}
