"""From questions to answers with probabilities: the core of both decision routes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from offramp.models.exits.points import point_for
from offramp.models.sampling_params import NEVER, ExitMode
from offramp.server.api.plan import refused
from offramp.server.engine.request import (
    AnswerRequest,
    AnswerResult,
    DecisionInfo,
    DecisionRequest,
    EngineInfo,
    FinishReason,
    RequestStats,
    TokenEvent,
)
from offramp.server.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ServerError,
    ShuttingDown,
)
from offramp.server.text.decisions import (
    EncodedQuestion,
    Question,
    QuestionKind,
    SameLabels,
    encode_questions,
    softmax,
)
from offramp.server.text.rendering import on_chat_worker

if TYPE_CHECKING:
    from offramp.server.api.context import Context
    from offramp.server.api.decision_bodies import DecisionExit, Message

# What stands for the input where the answers' probabilities without any are wanted (contextual
# calibration, arXiv 2102.09690).
_NO_INPUT: Final = "N/A"
_NO_TASK: Final = "none"
_MOST_PRIORS: Final = 4096
# Agreement promised to requests that name none, as for tokens.
_DEFAULT_QUALITY: Final = 0.98

Prior = tuple[tuple[float, ...], ...]


class PriorCache:
    """Logits of answers without an input, by question; the least recently used go first."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Prior] = OrderedDict()

    def get(self, key: bytes) -> Prior | None:
        """The prior of a question, if it is known."""
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        return found

    def put(self, key: bytes, prior: Prior) -> None:
        """Remember a prior."""
        self._known[key] = prior
        while len(self._known) > _MOST_PRIORS:
            self._known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for beside its questions.

    In errors ``paths`` name the questions' answers and ``source`` the input.
    """

    exits: DecisionExit
    calibrate: bool = True
    permutations: int = 1
    paths: tuple[str, ...] = ()
    source: str = "input"


@dataclass(frozen=True, slots=True)
class Answer:
    """Probabilities [options] in the question's order, and the layer that gave them.

    ``task`` is the trained task that answered. ``prompt`` are the ids the model read.
    """

    probabilities: tuple[float, ...]
    layer: int
    prompt: tuple[int, ...]
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Decided:
    """Answers in the order of the questions, and what they cost."""

    answers: tuple[Answer, ...]
    mode: ExitMode
    stats: RequestStats
    seconds: float


@dataclass(frozen=True, slots=True)
class _Variant:
    """One way to ask a question: the options in the order ``order``."""

    question: int
    order: tuple[int, ...]
    wording: str
    labels: tuple[str, ...]
    task: str | None


@dataclass(slots=True)
class _Plan:
    """All variants of a request's questions with their encoded prompts."""

    variants: list[_Variant]
    encoded: list[EncodedQuestion]
    priors: list[Prior | None] = field(default_factory=list)


async def decide(
    context: Context,
    request_id: str,
    messages: Sequence[Message],
    questions: Sequence[Question],
    wish: Wish,
) -> Decided:
    """Answer ``questions`` about a conversation.

    Raises InvalidRequest for what cannot be asked, ContextLengthExceeded, and what keeps the server
    from answering.
    """
    begun = time.monotonic()
    info = context.driver.info
    mode = _mode(context, wish.exits, info)
    variants = [
        variant
        for index, question in enumerate(questions)
        for variant in _variants(index, question, info, wish)
    ]
    plan = await _encode(context, messages, variants, wish)
    await _find_priors(context, request_id, messages, plan, wish)
    reads = [
        _reads(variant, encoded, info, _thresholds(variant.task, mode, wish.exits, info))
        for variant, encoded in zip(plan.variants, plan.encoded, strict=True)
    ]
    event = await read_answers(context, request_id, [read for own in reads for read in own])
    results = iter(event.answers)
    found = [[next(results) for _ in own] for own in reads]
    answers = tuple(
        _answer(index, question, plan, found, info) for index, question in enumerate(questions)
    )
    return Decided(answers, mode, event.stats, time.monotonic() - begun)


def _mode(context: Context, exits: DecisionExit, info: EngineInfo) -> ExitMode:
    if exits.mode is ExitMode.ADAPTIVE and not info.decision_tasks:
        raise refused("mode", "no decision heads are loaded for this model")
    if exits.mode is not None:
        return exits.mode
    if not info.decision_tasks or context.config.early_exit == ExitMode.OFF.value:
        return ExitMode.OFF
    return ExitMode.ADAPTIVE


def _variants(index: int, question: Question, info: EngineInfo, wish: Wish) -> list[_Variant]:
    labels = tuple(option.label for option in question.options)
    task = _task(index, question, labels, info, wish)
    if task is not None:
        own = info.decision_tasks[task]
        order = tuple(labels.index(label) for label in own.labels)
        return [_Variant(index, order, own.wording, own.labels, task)]
    count = min(wish.permutations, len(labels))
    if question.kind is not QuestionKind.CHOICE:
        count = 1
    made = []
    for shift in range(count):
        turn = shift * len(labels) // count
        order = (*range(turn, len(labels)), *range(turn))
        own_labels = tuple(labels[i] for i in order)
        made.append(_Variant(index, order, question.reordered(order).wording, own_labels, None))
    return made


def _task(
    index: int, question: Question, labels: tuple[str, ...], info: EngineInfo, wish: Wish
) -> str | None:
    """The trained task that answers: the one asked for, else the one with this very question."""
    name = wish.exits.task
    if name == _NO_TASK:
        return None
    if name is None:
        for found, own in info.decision_tasks.items():
            if sorted(own.labels) == sorted(labels) and (own.labelled or wish.calibrate):
                order = [labels.index(label) for label in own.labels]
                if own.wording == question.reordered(order).wording:
                    return found
        return None
    if name not in info.decision_tasks:
        known = ", ".join(sorted(info.decision_tasks)) or "none"
        raise refused("task", f"there is no task of that name; there are: {known}")
    if sorted(info.decision_tasks[name].labels) != sorted(labels):
        wanted = ", ".join(info.decision_tasks[name].labels)
        raise InvalidRequest(
            f"The task answers with {wanted}, but this question has other answers.",
            param=wish.paths[index],
        )
    if not (info.decision_tasks[name].labelled or wish.calibrate):
        raise InvalidRequest(
            f"Task '{name}' foresees calibrated answers; it has none without.",
            param="calibration",
        )
    return name


async def _encode(
    context: Context, messages: Sequence[Message], variants: list[_Variant], wish: Wish
) -> _Plan:
    tokenizer, info = context.loaded_tokenizer(), context.driver.info
    end = info.eos_token_ids[0] if info.eos_token_ids else info.vocab_size - 1
    texts = [(variant.wording, variant.labels) for variant in variants]
    tokenizer.refuse_hopeless(messages, info.max_model_len, wish.source)
    try:
        encoded = await on_chat_worker(encode_questions, tokenizer, messages, texts, end)
    except SameLabels as error:
        variant = variants[error.question]
        first, second = (variant.order[i] for i in (error.first, error.second))
        raise InvalidRequest(
            f"Answers {first} and {second} are the same to the model.",
            param=wish.paths[variant.question],
        ) from error
    except InvalidRequest as error:
        # The chat template's, which speaks of messages.
        raise InvalidRequest(error.message, param=wish.source) from error
    for own in encoded:
        longest = len(own.prompt) + max((len(read.path) for read in own.tree.reads), default=0)
        if longest > info.max_model_len:
            raise ContextLengthExceeded(
                f"This model's context is {info.max_model_len} tokens; the input with this "
                f"question has {longest}.",
                param=wish.source,
            )
        _check_ids(own, info, wish.source)
    return _Plan(variants, encoded)


def _check_ids(encoded: EncodedQuestion, info: EngineInfo, param: str) -> None:
    """Refuse ids of a tokenizer that knows more tokens than the model does."""
    reads = encoded.tree.reads
    said = (encoded.prompt, *(ids for read in reads for ids in (read.path, read.candidates)))
    if max(max(ids, default=0) for ids in said) >= info.vocab_size:
        raise InvalidRequest(
            f"The input has a token outside the model's vocabulary of {info.vocab_size}.",
            param=param,
        )


async def _find_priors(
    context: Context, request_id: str, messages: Sequence[Message], plan: _Plan, wish: Wish
) -> None:
    """Logits without an input of the questions that are not a task's; asked for only once."""
    if not wish.calibrate:
        plan.priors = [None] * len(plan.variants)
        return
    system = [message for message in messages if message["role"] == "system"]
    said = [message["content"] for message in system]
    keys = [_prior_key(said, variant) for variant in plan.variants]
    known = {key: context.priors.get(key) for key in keys}
    missing = {
        key: variant
        for key, variant in zip(keys, plan.variants, strict=True)
        if _needs_prior(variant, context.driver.info) and known[key] is None
    }
    if missing:
        empty = [*system, {"role": "user", "content": _NO_INPUT}]
        made = await _encode(context, empty, list(missing.values()), wish)
        reads = [
            _reads(replace(variant, task=None), encoded, context.driver.info, ())
            for variant, encoded in zip(made.variants, made.encoded, strict=True)
        ]
        all_reads = [read for own in reads for read in own]
        event = await read_answers(context, f"{request_id}-prior", all_reads)
        results = iter(event.answers)
        for key, own in zip(missing, reads, strict=True):
            known[key] = prior = tuple(next(results).logits for _ in own)
            context.priors.put(key, prior)
    plan.priors = [
        known[key] if _needs_prior(variant, context.driver.info) else None
        for key, variant in zip(keys, plan.variants, strict=True)
    ]


def _needs_prior(variant: _Variant, info: EngineInfo) -> bool:
    """Whether the model's own words answer, at full depth at least."""
    return variant.task is None or not info.decision_tasks[variant.task].labelled


def _prior_key(said: Sequence[str], variant: _Variant) -> bytes:
    """What a prior depends on; a digest, since clients decide how long that is."""
    parts = json.dumps([list(said), variant.wording, list(variant.labels)])
    return hashlib.sha256(parts.encode()).digest()


def _thresholds(
    task: str | None, mode: ExitMode, exits: DecisionExit, info: EngineInfo
) -> tuple[float, ...]:
    """The probability to leave at after each of the engine's decision layers; empty for none."""
    if mode is not ExitMode.ADAPTIVE or task is None:
        return ()
    heads = info.decision_tasks[task]
    own = _own_thresholds(heads, exits)
    if own is None:
        return ()
    found = dict(zip(heads.layers, own, strict=True))
    least = exits.min_layer or 0
    return tuple(
        found.get(layer, NEVER) if layer >= least else NEVER for layer in info.decision_layers
    )


def _own_thresholds(heads: DecisionInfo, exits: DecisionExit) -> tuple[float, ...] | None:
    if exits.threshold is not None:
        return (exits.threshold,) * len(heads.layers)
    quality = _DEFAULT_QUALITY if exits.quality is None else exits.quality
    point = point_for(heads.points, quality)
    if point is not None:
        return point.thresholds
    if exits.quality is not None:
        best = max((point.quality for point in heads.points), default=None)
        reach = "were not calibrated" if best is None else f"reach {best:g} at best"
        raise refused("quality", f"{quality:g} is out of reach; these decision heads {reach}")
    return None


def _reads(
    variant: _Variant, encoded: EncodedQuestion, info: EngineInfo, thresholds: tuple[float, ...]
) -> list[AnswerRequest]:
    task = variant.task
    labelled = task is not None and info.decision_tasks[task].labelled
    if labelled:
        places = tuple(range(len(variant.labels)))
        return [AnswerRequest(encoded.prompt, places, task, labelled, thresholds)]
    return [
        AnswerRequest((*encoded.prompt, *read.path), read.candidates, task, labelled, thresholds)
        for read in encoded.tree.reads
    ]


async def read_answers(
    context: Context, request_id: str, reads: Sequence[AnswerRequest]
) -> TokenEvent:
    """The engine's answer to all reads; leaving it aborts them.

    Raises ServerError if the engine could not read, DeadlineExceeded, and what the driver raises.
    """
    timeout = context.timeout()
    try:
        async with (
            asyncio.timeout(timeout),
            context.submit(DecisionRequest(request_id, tuple(reads))) as stream,
        ):
            event = await anext(aiter(stream))
    except TimeoutError:
        raise DeadlineExceeded(timeout or 0.0) from None
    if event.finish_reason is FinishReason.ERROR:
        raise ServerError(event.error or "The engine could not finish this request.")
    if event.finish_reason is FinishReason.ABORT:
        raise ShuttingDown(event.error or "The request was aborted.")
    return event


def _answer(
    index: int,
    question: Question,
    plan: _Plan,
    found: Sequence[Sequence[AnswerResult]],
    info: EngineInfo,
) -> Answer:
    """The mean over the ways a question was asked."""
    own = [place for place, variant in enumerate(plan.variants) if variant.question == index]
    sums = [0.0] * len(question.options)
    layer, task = 0, plan.variants[own[0]].task
    for place in own:
        variant, results, prior = plan.variants[place], found[place], plan.priors[place]
        early = results[0].layer < info.num_layers
        if task is not None and (early or info.decision_tasks[task].labelled):
            scale = info.decision_tasks[task].scale
            given = softmax([scale * logit for logit in results[0].logits])
        else:
            logits = [result.logits for result in results]
            given = plan.encoded[place].tree.probabilities(_less(logits, prior))
        for option, probability in zip(variant.order, given, strict=True):
            sums[option] += probability / len(own)
        layer = max(layer, *(result.layer for result in results), 0)
    return Answer(tuple(sums), layer, plan.encoded[own[0]].prompt, task)


def _less(logits: Sequence[Sequence[float]], prior: Prior | None) -> list[list[float]]:
    """Logits of every read with those of the prior taken off."""
    if prior is None:
        return [list(own) for own in logits]
    return [
        [a - b for a, b in zip(own, none, strict=True)]
        for own, none in zip(logits, prior, strict=True)
    ]
