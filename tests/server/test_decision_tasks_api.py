"""Trained questions over HTTP: where they leave, and which heads may be asked what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from offramp.models.exits.decision_heads import (
    DecisionFile,
    DecisionHeads,
    DecisionTask,
)
from offramp.models.exits.points import DecisionPoint
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.server.text.decisions import predicate
from tests.server.deciding import (
    CHOICE,
    LAYERS,
    PREDICATE,
    SCORE,
    Logits,
    Recorder,
    ask,
    constrained,
    post,
    prompt_of,
    refusal,
    serve,
    system_one,
    tiny_engine,
    transformers_logits,
)
from tests.server.fakes import CONTEXT

SURE = "It is certain."
MINE = "It is mine."


def sure_task(
    name: str, wording: str, points: tuple[DecisionPoint, ...], *, labelled: bool = True
) -> DecisionTask:
    """Heads that always say yes: with chances 0.7 after layer 1, 0.95 after 3, 0.99 at the top."""
    chances = torch.tensor([0.7, 0.95, 0.99])
    bias = torch.stack(((chances / (1 - chances)).log(), torch.zeros(3)), dim=1)
    heads = DecisionHeads((1, 3, LAYERS), torch.zeros(3, 2, 128), bias, points)
    return DecisionTask(name, wording, ("yes", "no"), heads, labelled, 1.0 if labelled else 0.5)


@pytest.fixture
def trained(tiny_dir: Path, tmp_path: Path) -> Recorder:
    """An engine with heads for three questions.

    Those of one are not calibrated, those of another foresee the model's own answers.
    """
    own = fingerprint(load_weights(tiny_dir, config_from_hf(tiny_dir), dtype=torch.float32))
    points = (
        DecisionPoint(0.9, (0.6, 0.6), 0.9, 1.0),
        DecisionPoint(0.98, (0.9, 0.9), 0.99, 3.0),
    )
    tasks = [
        sure_task("sure", predicate(SURE).wording, points),
        sure_task("raw", predicate("It is raw.").wording, ()),
        sure_task("own", predicate(MINE).wording, points, labelled=False),
    ]
    path = tmp_path / "a.decisions.safetensors"
    DecisionFile(own, {task.name: task for task in tasks}).save(path)
    return tiny_engine(tiny_dir, str(path))


@pytest.fixture(scope="module")
def logits_of(tiny_dir: Path) -> Logits:
    return transformers_logits(tiny_dir)


ASKED_SURE = {"type": "predicate", "instructions": SURE}


@pytest.mark.parametrize(
    ("wish", "layer", "probability"),
    [
        (None, 3, 0.95),
        ("adaptive", 3, 0.95),
        ("off", LAYERS, 0.99),
        ("lossless", LAYERS, 0.99),
        ({"quality": 0.9}, 1, 0.7),
        ({"quality": 0.8}, 1, 0.7),
        ({"quality": 0.95}, 3, 0.95),
        ({"threshold": 0.5}, 1, 0.7),
        ({"threshold": 0.99}, LAYERS, 0.99),
        ({"threshold": 0.5, "min_layer": 2}, 3, 0.95),
        ({"threshold": 0.5, "min_layer": 4}, LAYERS, 0.99),
        ({"threshold": 0.5, "mode": "off"}, LAYERS, 0.99),
    ],
)
async def test_a_trained_question_leaves_where_it_may(
    trained: Recorder, wish: Any, layer: int, probability: float
) -> None:
    async with serve(trained) as server:
        found = await ask(server, ASKED_SURE, early_exit=wish)
    assert found["answers"] == [
        {
            "type": "predicate",
            "name": None,
            "probability": pytest.approx(probability, abs=1e-3),
            "exit_layer": layer,
            "task": "sure",
        }
    ]
    tokens = found["usage"]["input_tokens"]
    depth = found["metrics"]["early_exit"]
    assert depth["layers_executed"] == layer * tokens
    assert depth["layers_skipped_fraction"] == pytest.approx(1 - layer / LAYERS)
    assert depth["exit_histogram"] == {str(layer): 1}
    assert depth["mean_exit_layer"] == layer
    # A task's heads know what they were trained for; nobody asks them without an input.
    assert len(trained.added) == 1


async def test_the_server_may_turn_early_exit_off(trained: Recorder) -> None:
    async with serve(trained, early_exit="off") as server:
        found = await ask(server, ASKED_SURE)
        asked = await ask(server, ASKED_SURE, early_exit="adaptive")
    assert found["metrics"]["early_exit"]["mode"] == "off"
    assert found["answers"][0]["exit_layer"] == LAYERS
    assert asked["answers"][0]["exit_layer"] == 3


async def test_tasks_can_be_named_or_left_aside(trained: Recorder) -> None:
    async with serve(trained) as server:
        both = await ask(server, ASKED_SURE, PREDICATE)
        none = await ask(server, ASKED_SURE, early_exit={"task": "none"})
        named = await ask(server, PREDICATE, early_exit={"task": "sure"})
        turned = {**CHOICE, "choices": [{"value": "no"}, {"value": "yes"}]}
        other = await ask(server, turned, early_exit={"task": "sure", "mode": "off"})
        raw = await ask(server, {"type": "predicate", "instructions": "It is raw."})
    assert [answer.get("task") for answer in both["answers"]] == ["sure", None]
    assert [answer["exit_layer"] for answer in both["answers"]] == [3, LAYERS]
    assert both["metrics"]["early_exit"]["exit_histogram"] == {"3": 1, "4": 1}
    assert both["metrics"]["early_exit"]["mean_exit_layer"] == 3.5
    assert "task" not in none["answers"][0]
    assert named["answers"][0]["probability"] == pytest.approx(0.95, abs=1e-3)
    chances = {each["value"]: each["probability"] for each in other["answers"][0]["probabilities"]}
    assert chances == pytest.approx({"no": 0.01, "yes": 0.99}, abs=1e-3)
    assert other["answers"][0]["choice"] == "yes"
    # Its heads were never calibrated.
    assert raw["answers"][0]["task"] == "raw"
    assert raw["answers"][0]["exit_layer"] == LAYERS


async def test_heads_that_foresee_the_models_own_answer(
    trained: Recorder, logits_of: Logits
) -> None:
    """At full depth the model answers itself, less what it says without an input."""
    mine = {"type": "predicate", "instructions": MINE}
    wording = predicate(MINE).wording
    prompt, empty = prompt_of(wording), prompt_of(wording, "N/A")
    labels = ("yes", "no")
    async with serve(trained) as server:
        early = await ask(server, mine, early_exit={"quality": 0.9})
        full = await ask(server, mine, early_exit="off")
        plain = await ask(server, mine, calibration="none")
    (answer,) = early["answers"]
    assert (answer["task"], answer["exit_layer"]) == ("own", 1)
    # It left because the heads are 0.7 sure; half their log-odds are the model's own.
    odds = (0.7 / 0.3) ** 0.5
    assert answer["probability"] == pytest.approx(odds / (1 + odds), abs=1e-3)
    (answer,) = full["answers"]
    assert (answer["task"], answer["exit_layer"]) == ("own", LAYERS)
    expected = constrained(logits_of, prompt, labels, empty)[0]
    assert answer["probability"] == pytest.approx(expected, abs=1e-4)
    (answer,) = plain["answers"]
    assert answer["exit_layer"] == LAYERS
    # Its heads know the calibrated answers only.
    assert "task" not in answer
    expected = constrained(logits_of, prompt, labels)[0]
    assert answer["probability"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"early_exit": {"task": "who"}}, "early_exit.task", "invalid_value"),
        ({"early_exit": {"quality": 0.99}}, "early_exit.quality", "invalid_value"),
        (
            {
                "early_exit": {"quality": 0.9},
                "questions": [{"type": "predicate", "instructions": "It is raw."}],
            },
            "early_exit.quality",
            "invalid_value",
        ),
        (
            {"questions": [PREDICATE, CHOICE], "early_exit": {"task": "sure"}},
            "questions[1].choices",
            "invalid_value",
        ),
        (
            {"questions": [PREDICATE, {**CHOICE, "choices": [{"value": True}, {"value": "true"}]}]},
            "questions[1].choices",
            "invalid_value",
        ),
        ({"input": "a " * (CONTEXT // 2)}, "input", "context_length_exceeded"),
        ({"input": "a " * 10 * CONTEXT}, "input", "context_length_exceeded"),
        (
            {"questions": [{**PREDICATE, "instructions": "a" * CONTEXT}]},
            "input",
            "context_length_exceeded",
        ),
        ({"questions": []}, "questions", "invalid_value"),
        # Its heads foresee calibrated answers only.
        (
            {
                "early_exit": {"task": "own"},
                "calibration": "none",
                "questions": [{"type": "predicate", "instructions": MINE}],
            },
            "calibration",
            "invalid_value",
        ),
    ],
)
async def test_what_cannot_be_asked(trained: Recorder, body: Any, param: str, code: str) -> None:
    async with serve(trained) as server:
        response = await post(
            server, "/v1/decisions", **{"input": "a", "questions": [ASKED_SURE], **body}
        )
    assert refusal(response) == (param, code)
    assert trained.added == []


async def test_metrics(trained: Recorder) -> None:
    async with serve(trained) as server:
        await ask(server, ASKED_SURE, CHOICE, SCORE, calibration="none")
        await system_one(
            server,
            {"a": {"type": "noul", "instructions": SURE}},
            early_exit={"threshold": 0.5},
        )
        async with httpx2.AsyncClient(base_url=server.url) as client:
            text = (await client.get("/metrics")).text
    values = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, number = line.rpartition(" ")
            values[name] = float(number)

    def value(name: str, **labels: str) -> float:
        found = [
            own
            for key, own in values.items()
            if key.startswith(f"{name}{{")
            and all(f'{label}="{said}"' in key for label, said in labels.items())
        ]
        assert len(found) == 1, name
        return found[0]

    for kind, count in (("predicate", 2), ("choice", 1), ("score", 1)):
        assert value("offramp:decisions_total", type=kind) == count
    assert value("offramp:exit_layer_count", phase="decision") == 4
    assert value("offramp:exit_layer_sum", phase="decision") == 1 + 3 + 2 * LAYERS
    assert value("offramp:exit_layer_bucket", phase="decision", le="1.0") == 1
    assert value("offramp:exit_layer_bucket", phase="decision", le="3.0") == 2
    assert value("vllm:request_success_total", finished_reason="stop") == 2


async def test_models_say_which_tasks_there_are(trained: Recorder) -> None:
    async with (
        serve(trained) as server,
        httpx2.AsyncClient(base_url=server.url) as client,
    ):
        card = (await client.get("/v1/models")).json()["data"][0]
    assert card["decision_tasks"]["sure"] == {
        "question": predicate(SURE).wording,
        "answers": ["yes", "no"],
        "qualities": [0.9, 0.98],
    }


def test_points_are_found_by_quality(trained: Recorder) -> None:
    """The fixture's points are those that the file holds."""
    own = trained.info.decision_tasks["sure"]
    assert [point.quality for point in own.points] == [0.9, 0.98]
    assert trained.info.decision_layers == (1, 3)
    assert replace(own, points=()) == replace(
        trained.info.decision_tasks["raw"], wording=own.wording
    )
