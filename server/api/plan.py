"""A checked body and its prompts to the engine's requests, early-exit settings included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from offramp.models.exits.points import OperatingPoint, point_for, points_under
from offramp.models.sampling_params import (
    DEFAULT_CRITERION,
    NEVER,
    ExitCriterion,
    ExitMode,
    ExitSettings,
    KVFill,
    SamplingParams,
)
from offramp.server.engine.request import GenerationRequest
from offramp.server.errors import ContextLengthExceeded, InvalidRequest

if TYPE_CHECKING:
    from offramp.server.api.context import Context
    from offramp.server.api.prepared import Prepared, Prompt
    from offramp.server.api.schemas import EarlyExit, GenerationBody
    from offramp.server.config import ServerConfig
    from offramp.server.engine.request import EngineInfo


SEED_BITS: Final = 63
# Odd, so that n choices of one request never share a seed.
_SEED_STEP: Final = 0x9E3779B97F4A7C15
# Below this, dividing logits overflows and the choice is greedy anyway.
_GREEDY_BELOW: Final = 1e-5


def plan(
    context: Context, body: GenerationBody, prepared: Prepared, request_id: str
) -> list[GenerationRequest]:
    """One request per choice, prompt by prompt; raises InvalidRequest or ContextLengthExceeded."""
    info, prompts, param = context.driver.info, prepared.prompts, prepared.param
    _check_token_ids(body, prompts, info)
    exits = exit_settings(context.config, body.early_exit, info)
    scored = _prompt_logprobs(body)
    if scored is not None:
        # A prompt token that leaves has no full-depth probabilities.
        exits = replace(exits, prefill_threshold=None)
    # -1 is what vLLM and llama.cpp take for none.
    unseeded = body.seed is None or body.seed == -1
    seed = context.seeds.getrandbits(SEED_BITS) if unseeded else int(body.seed or 0)
    if len(prompts) * body.n > context.driver.capacity:
        raise InvalidRequest(
            f"{len(prompts) * body.n} answers at once are more than this server takes, "
            f"{context.driver.capacity}.",
            param="n" if body.n > 1 else param,
        )
    # A special token's text is left out of answers, so a stop string of it is met by its id.
    stops = [*context.loaded_tokenizer().special_ids(body.stop), *body.stop_token_ids]
    if not body.ignore_eos:
        stops += context.end_tokens
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        max_tokens = answer_room(body, len(prompt), info.max_model_len, param)
        for _ in range(body.n):
            index = len(requests)
            sampling = _sampling(body, info, max_tokens, derived_seed(seed, index), stops)
            sampling = replace(sampling, prompt_logprobs=scored, bad_words=prepared.bad_words)
            requests.append(
                GenerationRequest(
                    f"{request_id}-{index}",
                    tuple(prompt),
                    sampling,
                    exits,
                    prepared.grammar,
                    body.priority,
                    body.cache_salt,
                )
            )
    return requests


def _prompt_logprobs(body: GenerationBody) -> int | None:
    """Best tokens wanted for each place of the prompt, None if no log-probabilities are.

    An answer that repeats its prompt has those of the prompt too.
    """
    echoed = body.wanted_logprobs if getattr(body, "echo", False) else None
    wished = [wish for wish in (body.prompt_logprobs, echoed) if wish is not None]
    return max(wished, default=None)


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
        "allowed_token_ids": max(body.allowed_token_ids, default=0),
        "prompt": max((max(prompt, default=0) for prompt in prompts), default=0),
    }
    for param, largest in fields.items():
        if largest >= info.vocab_size:
            raise InvalidRequest(
                f"{param} has a token id outside the vocabulary of {info.vocab_size}.", param=param
            )


def _sampling(
    body: GenerationBody, info: EngineInfo, max_tokens: int, seed: int, stops: Sequence[int]
) -> SamplingParams:
    if body.min_tokens > max_tokens:
        raise InvalidRequest("min_tokens is more than the answer may have.", param="min_tokens")
    open_ones = info.sampling_defaults.keys() - body.model_fields_set
    body = body.model_copy(update={name: info.sampling_defaults[name] for name in open_ones})
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature if body.temperature >= _GREEDY_BELOW and body.top_p else 0.0,
        # More tokens than there are is all of them; samplers count in 32 bits.
        top_k=min(max(int(body.top_k), 0), info.vocab_size),
        top_p=body.top_p or 1.0,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=tuple(body.logit_bias.items()),
        seed=seed,
        min_tokens=body.min_tokens,
        stop_token_ids=frozenset(stops),
        allowed_token_ids=tuple(sorted(set(body.allowed_token_ids))),
        logprobs=body.wanted_logprobs,
    )


def exit_settings(config: ServerConfig, wish: EarlyExit, info: EngineInfo) -> ExitSettings:
    """The request's wishes over the server's defaults; raises InvalidRequest."""
    _check(wish, info)
    # Wishes about how to leave early are a wish to leave early.
    default = ExitMode.ADAPTIVE if wish.wishes_exits else _default_mode(config, info)
    mode = ExitMode(wish.mode or default)
    # Without exits full depth is all there is; lossless still guesses by looking up the text.
    if not info.exit_layers and mode is ExitMode.ADAPTIVE:
        mode = ExitMode.OFF
    criterion = wish.criterion or config.exit_criterion
    fill = KVFill(wish.kv_fill or config.kv_fill)
    points = points_under(info.points, criterion, fill)
    strict, late = _thresholds(config, wish, info, points, criterion, mode)
    return ExitSettings(
        mode=mode,
        criterion=criterion,
        thresholds=strict,
        quality=wish.quality,
        min_layer=config.exit_min_layer if wish.min_layer is None else wish.min_layer,
        always=_always(config, wish),
        kv_fill=fill,
        prefill_threshold=info.prompt_threshold if wish.prefill else None,
        deadline_s=None if wish.deadline_ms is None else wish.deadline_ms / 1000,
        late_thresholds=late,
    )


def _always(config: ServerConfig, wish: EarlyExit) -> bool:
    """Whether tokens leave whatever it costs: who names a rule and its bound wants to see them."""
    named = wish.criterion is not None and wish.threshold is not None
    return (wish.when or ("always" if named else config.exit_when)) == "always"


def _default_mode(config: ServerConfig, info: EngineInfo) -> ExitMode:
    if config.early_exit != "auto":
        return ExitMode(config.early_exit)
    engine = config.engine
    wishes = (config.exit_threshold, engine.exit_quality, engine.exit_online_quality)
    exits = info.exit_layers and any(wish is not None for wish in wishes)
    guesses = info.draft_head and not info.decides_on_device
    return ExitMode.LOSSLESS if guesses and not exits else ExitMode.ADAPTIVE


def default_fault(config: ServerConfig, info: EngineInfo) -> str | None:
    """Why the server's defaults cannot be meant, in words for who starts it; None if they can.

    What one request may not combine, the defaults may not either.
    """
    if config.exit_min_layer > info.num_layers:
        return f"--exit-min-layer {config.exit_min_layer}: this model has {info.num_layers} layers"
    if config.exit_threshold is not None and config.engine.exit_quality is not None:
        return "--exit-quality and --exit-threshold exclude each other"
    points = points_under(info.points, config.exit_criterion, KVFill(config.kv_fill))
    adaptive = _default_mode(config, info) is ExitMode.ADAPTIVE and bool(info.exit_layers)
    if not adaptive or config.exit_threshold is not None:
        return None
    if not _lacks_thresholds(config.exit_criterion, points):
        return None
    return (
        f"--exit-criterion {config.exit_criterion} has no calibrated thresholds; give "
        "--exit-threshold, or make some with `offramp exits calibrate`"
    )


def _lacks_thresholds(criterion: ExitCriterion, points: Sequence[OperatingPoint]) -> bool:
    """Whether a request must name its own; the file's own are for the default."""
    return not points and criterion is not DEFAULT_CRITERION and criterion.needs_threshold


def _check(wish: EarlyExit, info: EngineInfo) -> None:
    if wish.mode is ExitMode.ADAPTIVE and not info.exit_layers:
        raise refused("mode", "no exits are loaded for this model")
    if wish.when is not None and wish.mode not in (None, ExitMode.ADAPTIVE):
        raise refused("when", "only adaptive tokens leave for good")
    if wish.min_layer is not None and wish.min_layer > info.num_layers:
        raise refused("min_layer", f"this model has {info.num_layers} layers")
    if wish.quality is not None and wish.threshold is not None:
        raise refused("threshold", "'quality' and 'threshold' exclude each other")
    if wish.prefill and info.prompt_threshold is None:
        message = "exits in prefill were not calibrated; start with --exit-prefill-threshold"
        raise refused("prefill", message)
    if wish.prefill and wish.kv_fill == "recompute":
        raise refused("kv_fill", "'recompute' would run every layer 'prefill' lets tokens skip")


def _thresholds(
    config: ServerConfig,
    wish: EarlyExit,
    info: EngineInfo,
    points: Sequence[OperatingPoint],
    criterion: ExitCriterion,
    mode: ExitMode,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Thresholds of the request, None for those in force, and those of a late answer."""
    count = len(info.exit_layers)
    if wish.deadline_ms is not None:
        return _deadline(config, wish, info, points, criterion)
    if wish.quality is not None:
        if points and _inputs_alone_keep(info, points, criterion, wish.quality):
            return (NEVER,) * count, None
        return _point(info, points, criterion, wish.quality).thresholds, None
    threshold = config.exit_threshold if wish.threshold is None else wish.threshold
    if threshold is not None:
        return (threshold,) * count, None
    if not criterion.needs_threshold:
        return (1.0,) * count, None
    if _lacks_thresholds(criterion, points) and mode is ExitMode.ADAPTIVE:
        message = f"criterion '{criterion}' has no calibrated thresholds; give one"
        raise refused("threshold", message)
    strictest = max(points, key=lambda point: point.quality, default=None)
    own = criterion is not DEFAULT_CRITERION and strictest is not None
    return (strictest.thresholds if own and strictest else None), None


def _inputs_alone_keep(
    info: EngineInfo, points: Sequence[OperatingPoint], criterion: ExitCriterion, quality: float
) -> bool:
    """Whether no exit keeps the quality but inputs of 8 bits do.

    Where these do not pay, full depth keeps it.
    """
    kept = info.coarse_quality if criterion is DEFAULT_CRITERION else None
    return kept is not None and point_for(points, quality) is None and quality <= kept


def _deadline(
    config: ServerConfig,
    wish: EarlyExit,
    info: EngineInfo,
    points: Sequence[OperatingPoint],
    criterion: ExitCriterion,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Start at the best quality; when late, fall to the least that is allowed."""
    least = wish.quality if wish.quality is not None else config.engine.quality_floor
    if least is None:
        message = "a deadline needs 'quality', or a server with --quality-floor, to trade with"
        raise refused("deadline_ms", message)
    loosest = _point(info, points, criterion, least)
    strictest = max(points, key=lambda point: point.quality)
    return strictest.thresholds, loosest.thresholds


def _point(
    info: EngineInfo, points: Sequence[OperatingPoint], criterion: ExitCriterion, quality: float
) -> OperatingPoint:
    point = point_for(points, quality)
    if point is None:
        best = max((point.quality for point in points), default=None)
        reach = _uncalibrated(info, criterion) if best is None else f"reach {best:g} at best"
        if info.coarse_quality is not None:
            reach += f", inputs of 8 bits {info.coarse_quality:g}"
        raise refused("quality", f"{quality:g} is out of reach; the loaded exits {reach}")
    return point


def _uncalibrated(info: EngineInfo, criterion: ExitCriterion) -> str:
    others = sorted({f"'{point.criterion}'" for point in info.points})
    if not others:
        return "have no calibrated operating points"
    if f"'{criterion}'" in others:
        fills = sorted({f"'{p.kv_fill}'" for p in info.points if p.criterion is criterion})
        return f"are calibrated with 'kv_fill' {', '.join(fills)}"
    return f"are calibrated for {', '.join(others)}, not for '{criterion}'"


def refused(field: str, message: str) -> InvalidRequest:
    """The error for a wish of ``early_exit`` that cannot be granted."""
    return InvalidRequest(f"early_exit.{field}: {message}.", param=f"early_exit.{field}")
