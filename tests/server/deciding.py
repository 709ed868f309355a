"""A server with the tiny model behind both decision routes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import httpx2
import torch
from transformers import AutoModelForCausalLM

from offramp.models.config import Weights
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.engine import Engine
from offramp.server.engine.loop import EngineRequest
from offramp.server.engine.request import DecisionRequest, EngineInfo, EngineOutput
from tests.server.fakes import CONTEXT, MODEL, PATIENCE_S, Running, byte_backend, serving

LAYERS = 4
END = 2
PREDICATE = {"type": "predicate", "instructions": "It is so."}
CHOICE = {
    "type": "choice",
    "instructions": "Which?",
    "choices": [{"value": "cat"}, {"value": "dog", "description": "it barks"}, {"value": "cow"}],
}
SCORE = {"type": "score", "instructions": "How?", "levels": [{"label": "bad"}, {"label": "good"}]}
SAID = {
    "predicate": ("Is the following true? It is so.\nAnswer with yes or no.", ("yes", "no")),
    "choice": (
        "Which?\ncat\ndog: it barks\ncow\nAnswer with cat, dog or cow.",
        ("cat", "dog", "cow"),
    ),
    "score": ("How?\n0: bad\n1: good\nAnswer with a number from 0 to 1.", ("0", "1")),
}


class Recorder:
    """An engine, and the requests that it was given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.added: list[DecisionRequest] = []

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def add(self, request: EngineRequest, submitted_at: float) -> None:
        assert isinstance(request, DecisionRequest)
        self.added.append(request)
        self.engine.add(request, submitted_at)

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    def step(self) -> EngineOutput:
        return self.engine.step()


def tiny_engine(folder: Path, heads: str = "none") -> Recorder:
    config = EngineConfig(
        model=MODEL,
        device="cpu",
        weights=Weights.FP32,
        exits="none",
        draft_head="none",
        decision_heads=heads,
        max_model_len=CONTEXT,
        block_size=16,
    )
    return Recorder(
        build_engine(config, folder, model_name=MODEL, num_blocks=200, check_invariants=True)
    )


def serve(engine: Recorder, **options: object) -> contextlib.AbstractAsyncContextManager[Running]:
    return serving(cast("Any", engine), **options)


async def post(server: Running, path: str, **body: Any) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        return await client.post(path, json=body)


async def ask(server: Running, *questions: Any, text: Any = "A cat.", **options: Any) -> Any:
    response = await post(server, "/v1/decisions", input=text, questions=questions, **options)
    assert response.status_code == 200, response.text
    return response.json()


async def system_one(server: Running, questions: Any, **options: Any) -> Any:
    response = await post(server, "/v1/systemone", state="A cat.", questions=questions, **options)
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(text: str) -> list[int]:
    found: list[int] = byte_backend().encode(text).ids
    return found


def prompt_of(wording: str, text: str = "A cat.") -> list[int]:
    return ids_of(f"user:{text}\n\n{wording}\n")


Logits = Callable[[Sequence[int]], torch.Tensor]


def transformers_logits(folder: Path) -> Logits:
    """Transformers' logits behind a prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(ids: Sequence[int]) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        return found

    return logits


def constrained(
    logits_of: Logits, prompt: Sequence[int], labels: Sequence[str], empty: Sequence[int] = ()
) -> list[float]:
    """Probabilities of an answer that may only be a label; those behind ``empty`` count less."""
    answers = [[*ids_of(label), END] for label in labels]
    found = []
    for answer in answers:
        chance = 1.0
        for length in range(len(answer)):
            path = answer[:length]
            allowed = sorted({own[length] for own in answers if own[:length] == path})
            logits = logits_of([*prompt, *path])[allowed]
            if empty:
                logits = logits - logits_of([*empty, *path])[allowed]
            chance *= float(logits.softmax(0)[allowed.index(answer[length])])
        found.append(chance)
    return found


def refusal(response: httpx2.Response, status: int = 400) -> tuple[str | None, str | None]:
    """Param and code of an error in its exact form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["param"], error["code"]
