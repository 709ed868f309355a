"""POST /v1/decisions (OpenAI) and /v1/systemone (System One): the routes, and their answers."""

import logging
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from offramp.server.api import span_attributes, wire
from offramp.server.api.context import Context, Shared
from offramp.server.api.deciding import Answer, Decided, Wish, decide
from offramp.server.api.decision_bodies import (
    DecisionBody,
    Message,
    SystemOneBody,
    SystemOneQuestion,
)
from offramp.server.text.decisions import Question, QuestionKind, confidence
from offramp.server.tracing import span_of

logger = logging.getLogger("offramp.requests")

router = APIRouter(tags=["Decisions"])


@router.post("/v1/decisions", response_model=None)
async def create_decision(body: DecisionBody, request: Request, context: Shared) -> Response:
    """Answer questions about an input with probabilities."""
    questions = [question.as_question() for question in body.questions]
    paths = tuple(f"questions[{index}].choices" for index in range(len(questions)))
    decided = await _decide(body, request, context, body.messages, questions, paths)
    answers = [
        {**_shape(question, asked, answer), **_extras(answer, body)}
        for question, asked, answer in zip(body.questions, questions, decided.answers, strict=True)
    ]
    stats = decided.stats
    usage = {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens,
    }
    return _response(context, decided, answers, usage)


@router.post("/v1/systemone", response_model=None)
async def create_system_one(body: SystemOneBody, request: Request, context: Shared) -> Response:
    """Answer named questions about a state with probabilities."""
    questions = {name: each.as_question() for name, each in body.questions.items()}
    paths = tuple(f"questions.{name}.criteria" for name in questions)
    asked = list(questions.values())
    decided = await _decide(body, request, context, body.messages, asked, paths)
    answers = {
        name: {**_system_one(own, questions[name], answer), **_extras(answer, body)}
        for (name, own), answer in zip(body.questions.items(), decided.answers, strict=True)
    }
    stats = decided.stats
    usage = {
        "input_tokens": stats.prompt_tokens,
        "output_tokens": 0,
        "total_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens},
    }
    return _response(context, decided, answers, usage)


async def _decide(
    body: DecisionBody | SystemOneBody,
    request: Request,
    context: Context,
    messages: Sequence[Message],
    questions: Sequence[Question],
    paths: tuple[str, ...],
) -> Decided:
    context.check_model(body.model)
    wish = Wish(
        body.early_exit,
        calibrate=body.calibration == "contextual",
        permutations=body.permutations,
        paths=paths,
        source="input" if isinstance(body, DecisionBody) else "state",
    )
    request_id = f"decision-{uuid.uuid4().hex}"
    decided = await wire.unless_disconnected(
        request, decide(context, request_id, messages, questions, wish)
    )
    kinds = Counter(question.kind.value for question in questions)
    layers = [answer.layer for answer in decided.answers]
    context.metrics.decisions(kinds, layers, decided.stats, decided.seconds)
    span = span_of(request)
    if span is not None:
        model, depth = context.model_name, context.driver.info.num_layers
        span.describe(model, span_attributes.decided(decided, model, depth))
    logger.info(
        "%s request_id=%s questions=%d input_tokens=%d mean_exit_layer=%.2f ms=%.1f",
        request_id,
        request.state.request_id,
        len(questions),
        decided.stats.prompt_tokens,
        sum(layers) / len(layers),
        1000 * decided.seconds,
    )
    return decided


def _shape(asked: Any, question: Question, answer: Answer) -> dict[str, Any]:
    """An answer as OpenAI's client types have it."""
    p = answer.probabilities
    head = {"type": question.kind.value, "name": asked.name}
    match question.kind:
        case QuestionKind.PREDICATE:
            return {**head, "probability": p[0]}
        case QuestionKind.CHOICE:
            values = [choice.value for choice in asked.choices]
            return {
                **head,
                "choice": values[p.index(max(p))],
                "confidence": confidence(p),
                "probabilities": [
                    {"value": value, "probability": own}
                    for value, own in zip(values, p, strict=True)
                ],
            }
        case QuestionKind.SCORE:
            return {
                **head,
                "score": _expected(p),
                "confidence": confidence(p),
                "probabilities": [
                    {"value": value, "label": level.label, "probability": own}
                    for value, (level, own) in enumerate(zip(asked.levels, p, strict=True))
                ],
            }


def _system_one(asked: SystemOneQuestion, question: Question, answer: Answer) -> dict[str, Any]:
    p = answer.probabilities
    if question.kind is QuestionKind.PREDICATE:
        return {"type": "noul", "noul": p[0]}
    if question.kind is QuestionKind.CHOICE:
        names = list(asked.criteria)
        found: dict[str, Any] = {"choice": names[p.index(max(p))]}
    else:
        names = [option.label for option in question.options]
        found = {"score": _expected(p), "legend": dict(zip(names, asked.criteria, strict=True))}
    return {
        "type": asked.type,
        **found,
        "probabilities": dict(zip(names, p, strict=True)),
        "confidence": confidence(p),
    }


def _expected(probabilities: Sequence[float]) -> float:
    return sum(index * p for index, p in enumerate(probabilities))


def _extras(answer: Answer, body: DecisionBody | SystemOneBody) -> dict[str, Any]:
    """What this server says beside: where the answer left the stack."""
    found: dict[str, Any] = {"exit_layer": answer.layer}
    if answer.task is not None:
        found["task"] = answer.task
    if body.return_prompt_token_ids:
        found["prompt_token_ids"] = list(answer.prompt)
    return found


def _response(
    context: Context, decided: Decided, answers: object, usage: Mapping[str, Any]
) -> Response:
    layers = [answer.layer for answer in decided.answers]
    total, stats = context.driver.info.num_layers, decided.stats
    # Blocks of the prompt that others had computed already are neither run nor skipped.
    possible = total * (stats.prompt_tokens - stats.cached_tokens)
    counts = Counter(layers)
    early_exit = {
        "mode": decided.mode.value,
        "layers_total": total,
        "mean_exit_layer": sum(layers) / len(layers),
        "layers_executed": stats.layers_executed,
        "layers_skipped_fraction": max(0.0, 1 - stats.layers_executed / possible),
        "exit_histogram": {str(layer): counts[layer] for layer in sorted(counts)},
    }
    body = {
        "model": context.model_name,
        "answers": answers,
        "usage": usage,
        "metrics": {"early_exit": early_exit, "seconds": decided.seconds},
    }
    return JSONResponse(body)
