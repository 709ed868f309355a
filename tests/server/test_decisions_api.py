"""Both decision routes over HTTP, with the tiny model behind them."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM

from offramp.models.config import Weights
from offramp.models.step import Step, StepResult
from offramp.server.api.context import Context
from offramp.server.api.deciding import PriorCache
from offramp.server.app import create_app
from offramp.server.config import EngineConfig, ServerConfig
from offramp.server.engine.build import build_engine, runner_of
from offramp.server.engine.driver import EngineDriver
from offramp.server.engine.engine import Engine
from offramp.server.engine.workers import ThreadWorker
from offramp.server.metrics import Metrics
from offramp.server.text.decisions import confidence
from offramp.server.text.tokenizer import Tokenizer
from tests.server.deciding import (
    CHOICE,
    LAYERS,
    PREDICATE,
    SAID,
    SCORE,
    Logits,
    Recorder,
    ask,
    constrained,
    ids_of,
    post,
    prompt_of,
    refusal,
    serve,
    system_one,
    tiny_engine,
    transformers_logits,
)
from tests.server.fakes import CONTEXT, MODEL


@pytest.fixture
def plain(tiny_dir: Path) -> Recorder:
    """An engine without decision heads."""
    return tiny_engine(tiny_dir)


@pytest.fixture(scope="module")
def logits_of(tiny_dir: Path) -> Logits:
    return transformers_logits(tiny_dir)


def wanted(logits_of: Logits, kind: str, *, calibrated: bool) -> list[float]:
    wording, labels = SAID[kind]
    empty = prompt_of(wording, "N/A") if calibrated else []
    return constrained(logits_of, prompt_of(wording), labels, empty)


CALIBRATIONS = pytest.mark.parametrize("calibration", ["contextual", "none"])


@CALIBRATIONS
async def test_answers_of_decisions(plain: Recorder, logits_of: Logits, calibration: str) -> None:
    async with serve(plain) as server:
        found = await ask(
            server, {**PREDICATE, "name": "so"}, CHOICE, SCORE, calibration=calibration
        )
    assert list(found) == ["model", "answers", "usage", "metrics"]
    assert found["model"] == MODEL
    so, which, how = found["answers"]
    calibrated = calibration == "contextual"
    p = {kind: wanted(logits_of, kind, calibrated=calibrated) for kind in SAID}
    assert so == {
        "type": "predicate",
        "name": "so",
        "probability": pytest.approx(p["predicate"][0], abs=1e-4),
        "exit_layer": LAYERS,
    }
    names = ["cat", "dog", "cow"]
    assert which == {
        "type": "choice",
        "name": None,
        "choice": names[p["choice"].index(max(p["choice"]))],
        "confidence": pytest.approx(confidence(p["choice"]), abs=1e-3),
        "probabilities": [
            {"value": name, "probability": pytest.approx(own, abs=1e-4)}
            for name, own in zip(names, p["choice"], strict=True)
        ],
        "exit_layer": LAYERS,
    }
    assert how == {
        "type": "score",
        "name": None,
        "score": pytest.approx(p["score"][1], abs=1e-4),
        "confidence": pytest.approx(confidence(p["score"]), abs=1e-3),
        "probabilities": [
            {"value": value, "label": label, "probability": pytest.approx(own, abs=1e-4)}
            for value, (label, own) in enumerate(zip(("bad", "good"), p["score"], strict=True))
        ],
        "exit_layer": LAYERS,
    }


@CALIBRATIONS
async def test_answers_of_system_one(plain: Recorder, logits_of: Logits, calibration: str) -> None:
    questions = {
        "so": {"type": "noul", "instructions": "It is so."},
        "which": {
            "type": "choice",
            "instructions": "Which?",
            "criteria": {"cat": None, "dog": "it barks", "cow": ""},
        },
        "how": {"type": "score", "instructions": "How?", "criteria": ["bad", "good"]},
    }
    async with serve(plain) as server:
        found = await system_one(server, questions, calibration=calibration)
    assert list(found["answers"]) == ["so", "which", "how"]
    calibrated = calibration == "contextual"
    p = {kind: wanted(logits_of, kind, calibrated=calibrated) for kind in SAID}
    which = dict(zip(("cat", "dog", "cow"), p["choice"], strict=True))
    assert found["answers"] == {
        "so": {
            "type": "noul",
            "noul": pytest.approx(p["predicate"][0], abs=1e-4),
            "exit_layer": LAYERS,
        },
        "which": {
            "type": "choice",
            "choice": max(which, key=lambda name: which[name]),
            "probabilities": pytest.approx(which, abs=1e-4),
            "confidence": pytest.approx(confidence(p["choice"]), abs=1e-3),
            "exit_layer": LAYERS,
        },
        "how": {
            "type": "score",
            "score": pytest.approx(p["score"][1], abs=1e-4),
            "legend": {"0": "bad", "1": "good"},
            "probabilities": pytest.approx({"0": p["score"][0], "1": p["score"][1]}, abs=1e-4),
            "confidence": pytest.approx(confidence(p["score"]), abs=1e-3),
            "exit_layer": LAYERS,
        },
    }


async def test_the_official_client_understands_the_answers(plain: Recorder) -> None:
    asked: list[Any] = [{**PREDICATE, "name": "so"}, CHOICE, SCORE]
    asked.append({**CHOICE, "choices": [{"value": True}, {"value": "no idea"}, {"value": False}]})
    async with serve(plain) as server:
        decisions = getattr(server.client, "decisions", None)
        if decisions is None:
            pytest.skip("this client knows no decisions")
        found = await decisions.create(model=MODEL, input="A cat.", questions=asked)
    assert [answer.type for answer in found.answers] == ["predicate", "choice", "score", "choice"]
    so, which, how, typed = found.answers
    assert so.name == "so"
    assert which.name is None
    assert 0 < so.probability < 1
    assert which.choice == max(which.probabilities, key=lambda each: each.probability).value
    assert how.score == pytest.approx(how.probabilities[1].probability)
    assert [each.value for each in typed.probabilities] == [True, "no idea", False]
    assert type(typed.choice) is type(
        max(typed.probabilities, key=lambda each: each.probability).value
    )
    assert found.usage.total_tokens == found.usage.input_tokens > 0
    assert found.usage.output_tokens_details.reasoning_tokens == 0


async def test_usage_and_depth(plain: Recorder) -> None:
    """What questions share is counted once; what was cached already was not run again."""
    text = "A cat in a hat sat on a mat."
    prompts = [prompt_of(SAID[kind][0], text) for kind in ("predicate", "score")]
    shared = next(i for i, pair in enumerate(zip(*prompts, strict=False)) if len(set(pair)) > 1)
    tokens = shared + sum(len(prompt) - shared for prompt in prompts)
    async with serve(plain) as server:
        found = await ask(server, PREDICATE, SCORE, text=text, calibration="none")
        again = await ask(server, PREDICATE, SCORE, text=text, calibration="none")
    cached = shared // 16 * 16
    for answer, hit in ((found, 0), (again, cached)):
        assert answer["usage"] == {
            "input_tokens": tokens,
            "input_tokens_details": {"cached_tokens": hit, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens,
        }
        assert answer["metrics"]["early_exit"] == {
            "mode": "off",
            "layers_total": LAYERS,
            "mean_exit_layer": LAYERS,
            "layers_executed": LAYERS * (tokens - hit),
            "layers_skipped_fraction": 0,
            "exit_histogram": {str(LAYERS): 2},
        }
    assert cached == 32
    assert found["metrics"]["seconds"] > 0
    assert again["answers"] == found["answers"]


async def test_usage_of_system_one(plain: Recorder) -> None:
    tokens = len(prompt_of(SAID["predicate"][0]))
    asked = {"so": {"type": "noul", "instructions": "It is so."}}
    async with serve(plain) as server:
        found = await system_one(server, asked, calibration="none")
    assert found["usage"] == {
        "input_tokens": tokens,
        "output_tokens": 0,
        "total_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0},
    }
    assert found["metrics"]["early_exit"]["layers_executed"] == LAYERS * tokens


async def test_prompts_can_be_seen(plain: Recorder) -> None:
    async with serve(plain) as server:
        found = await ask(server, PREDICATE, CHOICE, return_prompt_token_ids=True)
        one = await system_one(
            server,
            {"so": {"type": "noul", "instructions": "It is so."}},
            return_prompt_token_ids=True,
        )
    wordings = [SAID[kind][0] for kind in ("predicate", "choice")]
    ids = [answer["prompt_token_ids"] for answer in found["answers"]]
    assert ids == [prompt_of(wording) for wording in wordings]
    assert one["answers"]["so"]["prompt_token_ids"] == prompt_of(wordings[0])


async def test_conversations(plain: Recorder) -> None:
    conversation = [
        {"role": "developer", "content": "Be good"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    async with serve(plain) as server:
        found = await ask(server, PREDICATE, text=conversation, return_prompt_token_ids=True)
    wording = SAID["predicate"][0]
    text = f"system:Be good\nuser:hi\nassistant:Hello\nuser:\n\n{wording}\n"
    assert found["answers"][0]["prompt_token_ids"] == ids_of(text)


async def test_permutations_are_averaged(plain: Recorder, logits_of: Logits) -> None:
    """The order of the options, in turn; of a predicate there is but one."""
    options = [("cat", ""), ("dog", ": it barks"), ("cow", "")]
    sums = dict.fromkeys(("cat", "dog", "cow"), 0.0)
    for turn in range(3):
        turned = options[turn:] + options[:turn]
        labels = [name for name, _ in turned]
        lines = [f"{name}{description}" for name, description in turned]
        ask_for = f"Answer with {labels[0]}, {labels[1]} or {labels[2]}."
        prompt = prompt_of("\n".join(["Which?", *lines, ask_for]))
        for name, own in zip(labels, constrained(logits_of, prompt, labels), strict=True):
            sums[name] += own / 3
    async with serve(plain) as server:
        found = await ask(server, CHOICE, PREDICATE, permutations=8, calibration="none")
        once = await ask(server, PREDICATE, calibration="none")
    probabilities = {
        each["value"]: each["probability"] for each in found["answers"][0]["probabilities"]
    }
    assert probabilities == pytest.approx(sums, abs=1e-4)
    # The three labels begin with two letters, and those with "c" need another read.
    assert len(plain.added[0].reads) == 3 * 2 + 1
    # In another step, so not to the last bit.
    alone = once["answers"][0]["probability"]
    assert found["answers"][1]["probability"] == pytest.approx(alone, rel=1e-5)


async def test_what_is_said_without_an_input_is_asked_for_once(plain: Recorder) -> None:
    async with serve(plain) as server:
        first = await ask(server, PREDICATE, CHOICE)
        again = await ask(server, CHOICE, PREDICATE)
        await ask(server, PREDICATE, SCORE, text="Another cat.")
        system = [{"role": "system", "content": "Be good"}, {"role": "user", "content": "A cat."}]
        await ask(server, PREDICATE, text=system)
        await ask(server, PREDICATE, text=system)
        await ask(server, SCORE, calibration="none")
    priors = [request.request_id.endswith("-prior") for request in plain.added]
    assert priors == [True, False, False, True, False, True, False, False, False]
    assert [len(request.reads) for request in plain.added] == [3, 3, 3, 1, 2, 1, 1, 1, 1]
    assert again["answers"][0]["choice"] == first["answers"][1]["choice"]
    empty = prompt_of(SAID["score"][0], "N/A")
    assert list(plain.added[3].reads[0].tokens) == empty


async def test_a_prior_that_is_forgotten_at_once_still_counts(
    plain: Recorder, logits_of: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.server.api.deciding._MOST_PRIORS", 1)
    async with serve(plain) as server:
        found = await ask(server, PREDICATE, CHOICE, SCORE)
    expected = wanted(logits_of, "predicate", calibrated=True)
    assert found["answers"][0]["probability"] == pytest.approx(expected[0], abs=1e-4)


def test_the_least_recently_used_priors_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.server.api.deciding._MOST_PRIORS", 2)
    cache = PriorCache()
    cache.put(b"a", ((1.0,),))
    cache.put(b"b", ((2.0,),))
    assert cache.get(b"a") == ((1.0,),)
    cache.put(b"c", ((3.0,),))
    assert [cache.get(key) for key in (b"a", b"b", b"c")] == [((1.0,),), None, ((3.0,),)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"early_exit": {"task": "who"}}, "early_exit.task"),
        ({"early_exit": "adaptive"}, "early_exit.mode"),
        (
            {
                "questions": {
                    "q": {"type": "choice", "instructions": "?", "criteria": {"a": "", " a": ""}}
                }
            },
            "questions.q.criteria",
        ),
    ],
)
async def test_what_system_one_cannot_be_asked(plain: Recorder, body: Any, param: str) -> None:
    questions = {"q": {"type": "noul", "instructions": "So?"}}
    async with serve(plain) as server:
        response = await post(
            server, "/v1/systemone", **{"state": "a", "questions": questions, **body}
        )
    assert refusal(response) == (param, "invalid_value")


async def test_errors_name_the_field_that_the_body_has(plain: Recorder) -> None:
    """A chat template speaks of messages, of which these bodies have none."""
    conversation = [{"role": "system", "content": "refuse me"}, {"role": "user", "content": "a"}]
    noul = {"q": {"type": "noul", "instructions": "So?"}}
    async with serve(plain) as server:
        refused = await post(
            server, "/v1/decisions", input=conversation, questions=[PREDICATE], calibration="none"
        )
        long = await post(server, "/v1/systemone", state="a " * CONTEXT, questions=noul)
        longer = await post(server, "/v1/systemone", state="a " * 10 * CONTEXT, questions=noul)
    assert refusal(refused) == ("input", "invalid_value")
    assert refusal(long) == refusal(longer) == ("state", "context_length_exceeded")


async def test_tokens_that_the_model_does_not_have_are_refused(plain: Recorder) -> None:
    """A tokenizer may know more of them; their rows would be read outside the weights."""
    plain.engine.info = replace(plain.engine.info, vocab_size=60)
    async with serve(plain) as server:
        response = await post(server, "/v1/decisions", input="a", questions=[PREDICATE])
    assert refusal(response) == ("input", "invalid_value")
    assert "vocabulary of 60" in response.text
    assert plain.added == []


async def test_other_models_are_not_found(plain: Recorder) -> None:
    async with serve(plain) as server:
        for path, body in (
            ("/v1/decisions", {"input": "a", "questions": [PREDICATE]}),
            (
                "/v1/systemone",
                {"state": "a", "questions": {"q": {"type": "noul", "instructions": "?"}}},
            ),
        ):
            response = await post(server, path, model="gpt-9", **body)
            assert refusal(response, 404) == ("model", "model_not_found")
            assert (await post(server, path, model=MODEL, **body)).status_code == 200


async def test_adaptive_needs_heads(plain: Recorder) -> None:
    async with serve(plain) as server:
        response = await post(
            server, "/v1/decisions", input="a", questions=[PREDICATE], early_exit="adaptive"
        )
    assert refusal(response) == ("early_exit.mode", "invalid_value")


async def test_a_failing_device_is_the_servers_fault(plain: Recorder) -> None:
    """And the next request is answered."""
    runner = runner_of(plain.engine)
    steps = itertools.count()

    class Failing:
        def run(self, step: Step) -> StepResult:
            if next(steps) == 1:
                raise RuntimeError("no memory")
            return runner.run(step)

    plain.engine.decisions._runner = Failing()
    async with serve(plain) as server:
        response = await post(
            server, "/v1/decisions", input="a", questions=[PREDICATE], calibration="none"
        )
        again = await ask(server, PREDICATE, calibration="none")
    assert refusal(response, 500) == (None, "internal_error")
    assert "memory" not in response.text
    assert 0 < again["answers"][0]["probability"] < 1


@contextlib.asynccontextmanager
async def client_of(engine: Engine, tokenizer: Tokenizer) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an application around an engine, without a socket."""
    config = ServerConfig(engine=EngineConfig(model=MODEL))
    metrics = Metrics(MODEL)
    driver = EngineDriver(lambda: ThreadWorker(lambda: engine), metrics.observe)
    context = Context(driver, config, metrics, tokenizer)
    driver.start()
    metrics.configure(await driver.ready())
    transport = httpx2.ASGITransport(create_app(context))
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        await driver.stop()


@pytest.fixture
def embedded(smollm2_dir: Path) -> tuple[Engine, Tokenizer]:
    config = EngineConfig(
        model=MODEL,
        device="cpu",
        weights=Weights.FP32,
        dtype="float32",
        exits="none",
        draft_head="none",
        decision_heads="none",
        max_model_len=512,
    )
    engine = build_engine(config, smollm2_dir, model_name=MODEL, num_blocks=64)
    return engine, Tokenizer.load(smollm2_dir)


@pytest.mark.weights
@pytest.mark.timeout(180)
async def test_the_embedded_model_says_what_transformers_says(
    smollm2_dir: Path, embedded: tuple[Engine, Tokenizer]
) -> None:
    engine, tokenizer = embedded
    body = {
        "input": "The battery of this phone lasts for two days, and I love its screen.",
        "questions": [
            {"type": "predicate", "instructions": "The review is positive."},
            {
                "type": "choice",
                "instructions": "What is it about?",
                "choices": [{"value": "phone"}, {"value": "car"}, {"value": "book"}],
            },
        ],
        "calibration": "none",
        "early_exit": "off",
        "return_prompt_token_ids": True,
    }
    async with client_of(engine, tokenizer) as client:
        response = await client.post("/v1/decisions", json=body)
    positive, about = response.json()["answers"]
    theirs: Any = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    for answer, labels, chances in (
        (positive, ("yes", "no"), [positive["probability"], 1 - positive["probability"]]),
        (
            about,
            ("phone", "car", "book"),
            [each["probability"] for each in about["probabilities"]],
        ),
    ):
        prompt = torch.tensor([answer["prompt_token_ids"]])
        with torch.inference_mode():
            logits = theirs(input_ids=prompt).logits[0, -1]
        ids = [own[0] for own in tokenizer.encode_rendered(labels)]
        assert len(set(ids)) == len(labels)
        expected = logits[ids].softmax(0).tolist()
        assert chances == pytest.approx(expected, abs=1e-3)
        assert math.fsum(chances) == pytest.approx(1)
