"""A checked body and its prompts to the engine's requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from offramp.models.sampling_params import SamplingParams
from offramp.server.api.exits import exit_settings
from offramp.server.engine.request import GenerationRequest
from offramp.server.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from offramp.server.api.context import Context
    from offramp.server.api.schemas import GenerationBody
    from offramp.server.engine.request import EngineInfo

SEED_BITS: Final = 63
# Odd, so that n choices of one request never share a seed.
_SEED_STEP: Final = 0x9E3779B97F4A7C15
# Below this, dividing logits overflows and the choice is greedy anyway.
_GREEDY_BELOW: Final = 1e-5

Prompt = tuple[int, ...]


def plan(
    context: Context, body: GenerationBody, prompts: Sequence[Prompt], request_id: str
) -> list[GenerationRequest]:
    """One request per choice, prompt by prompt; raises InvalidRequest or ContextLengthExceeded."""
    info = context.driver.info
    param = "messages" if hasattr(body, "messages") else "prompt"
    _check_token_ids(body, prompts, info)
    exits = exit_settings(context.config, body.early_exit, info)
    seed = context.seeds.getrandbits(SEED_BITS) if body.seed is None else body.seed
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        max_tokens = answer_room(body, len(prompt), info.max_model_len, param)
        for _ in range(body.n):
            index = len(requests)
            sampling = _sampling(body, info, max_tokens, derived_seed(seed, index))
            requests.append(
                GenerationRequest(f"{request_id}-{index}", tuple(prompt), sampling, exits)
            )
    return requests


def derived_seed(seed: int, index: int) -> int:
    """Seed of choice ``index``; the first keeps the request's own."""
    return (seed + index * _SEED_STEP) & ((1 << SEED_BITS) - 1)


def answer_room(body: GenerationBody, prompt_tokens: int, max_model_len: int, param: str) -> int:
    """Tokens the answer may have; raises ContextLengthExceeded when there is no room."""
    room = max_model_len - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    asked = body.asked_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = f" and {asked} for the answer" if asked is not None else ""
        raise ContextLengthExceeded(
            f"This model's context is {max_model_len} tokens; the request has {prompt_tokens} in "
            f"the prompt{wanted}.",
            param=param,
        )
    return min(asked or body.default_tokens or room, room)


def _check_token_ids(body: GenerationBody, prompts: Sequence[Prompt], info: EngineInfo) -> None:
    fields = {
        "logit_bias": max(body.logit_bias, default=0),
        "stop_token_ids": max(body.stop_token_ids, default=0),
        "prompt": max((max(prompt, default=0) for prompt in prompts), default=0),
    }
    for param, largest in fields.items():
        if largest >= info.vocab_size:
            raise InvalidRequest(
                f"{param} has a token id outside the vocabulary of {info.vocab_size}.", param=param
            )


def _sampling(body: GenerationBody, info: EngineInfo, max_tokens: int, seed: int) -> SamplingParams:
    if body.min_tokens > max_tokens:
        raise InvalidRequest("min_tokens is more than the answer may have.", param="min_tokens")
    ends = () if body.ignore_eos else info.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature if body.temperature >= _GREEDY_BELOW else 0.0,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=tuple(body.logit_bias.items()),
        seed=seed,
        min_tokens=body.min_tokens,
        stop_token_ids=frozenset((*ends, *body.stop_token_ids)),
    )
