"""Prompts that climb the stack segment by segment, and heads that read on the way."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from offramp.kernels.decoder import Taps
from offramp.kernels.native import library
from offramp.kernels.rows import HostRows, Span
from offramp.kernels.weight_formats import WeightFormat
from offramp.models.deciding import Decider
from offramp.models.exits.decision_heads import (
    FORMAT,
    DecisionFile,
    DecisionFileError,
    DecisionHeads,
    DecisionTask,
    load_decision_heads,
    read_decision_metadata,
)
from offramp.models.exits.points import DecisionPoint
from offramp.models.loading.formats import all_in
from offramp.models.sampling_params import NEVER
from offramp.models.step import AnswerRead, Decide, Pooling, PromptRows, Step, StepResult
from offramp.models.transformer import Transformer
from offramp.server.engine.blocks import BlockPool, SequenceMemory
from offramp.server.engine.decisions import Decisions
from offramp.server.engine.kv_debt import DebtLedger, RowPool
from offramp.server.engine.request import AnswerRequest, DecisionRequest, EngineInfo

from .small import (
    BLOCK,
    CPU,
    FAMILIES,
    LAYERS,
    POSITIONS,
    SIZES,
    VOCAB,
    forward,
    make,
    new_cache,
    random_ids,
)

CUTS = (1, 4)
WIDTH = 64
SHAPE = SIZES | {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LABELS = ("yes", "no", "maybe")
NATIVE = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(library() is None, reason="no C compiler")),
]


def heads_of(*layers: int, labels: Sequence[str] = LABELS) -> DecisionHeads:
    generator = torch.Generator().manual_seed(sum(layers))
    shape = (len(layers), len(labels), 2 * WIDTH)
    weight = torch.randn(shape, generator=generator).half().float()
    bias = torch.randn(shape[:2], generator=generator)
    bounds = (0.9,) * (len(layers) - 1)
    return DecisionHeads(layers, weight, bias, (DecisionPoint(0.95, bounds, 0.97, 2.5),))


def task_of(name: str, *layers: int, labels: Sequence[str] = LABELS) -> DecisionTask:
    heads = heads_of(*layers, labels=labels)
    return DecisionTask(name, f"{name}?", tuple(labels), heads, name == "all", 0.25, {"rows": 3})


TASKS = {
    "all": task_of("all", 1, 4, LAYERS),
    "late": task_of("late", 4, LAYERS, labels=("a", "b")),
}


def both(folder: Path, *, native: bool) -> tuple[Any, Transformer]:
    """Transformers' model and ours."""
    form = WeightFormat.FP32 if native else WeightFormat.PLAIN
    recipes = all_in(form)
    theirs, model = make(LlamaConfig(**SHAPE), folder, recipes)
    assert model.segments[0].is_native is native
    return theirs, model


def transformer(folder: Path, *, native: bool = False) -> Transformer:
    return both(folder, native=native)[1]


def decider_of(model: Transformer, blocks: int = 40) -> Decider:
    """Nothing in it can be read before it was written."""
    made = Decider(model, new_cache(model, blocks), CUTS, TASKS)
    made._states.fill_(torch.nan)
    made._sums.fill_(torch.nan)
    return made


@torch.inference_mode()
def run(made: Decider, step: Decide) -> tuple[tuple[float, ...], ...]:
    return made.run(step)


def climb(
    made: Decider,
    prompts: Sequence[Sequence[int]],
    tables: Sequence[Sequence[int]],
    segments: range,
    chunk: int = 100,
    *,
    task: str | None = None,
    pooling: Pooling | None = None,
) -> list[tuple[float, ...]]:
    """Take prompts through segments, ``chunk`` blocks of each a step; reads after the last."""
    candidates = tuple(range(VOCAB)) if task is None else (0, 1, 2)
    found: list[tuple[float, ...]] = [()] * len(prompts)
    for segment in segments:
        for start in range(0, max(map(len, prompts)), chunk * BLOCK):
            work, reads, asked = [], [], []
            for index, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
                end = min(start + chunk * BLOCK, len(prompt))
                if start >= end:
                    continue
                ids = tuple(prompt[start:end]) if segment == 0 else ()
                work.append(PromptRows(range(start, end), table, ids))
                if end == len(prompt) and segment == segments[-1]:
                    reads.append(AnswerRead(len(work) - 1, table, end, candidates, task, pooling))
                    asked.append(index)
            for index, logits in zip(
                asked, run(made, Decide(segment, tuple(work), tuple(reads))), strict=True
            ):
                found[index] = logits
    return found


def tables_of(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Blocks in no order, as they are that were free here and there."""
    counts = [-(-len(prompt) // BLOCK) for prompt in prompts]
    blocks = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)).tolist()
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [blocks[begin:end] for begin, end in pairwise(ends)]


def plain(model: Transformer, prompt: Sequence[int]) -> Tensor:
    """Logits behind a prompt in one pass of its own."""
    cache = new_cache(model)
    return forward(model, cache, [(0, prompt, range(-(-len(prompt) // BLOCK)))])[-1]


FULL = range(len(CUTS) + 1)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_full_depth_is_a_plain_pass(tmp_path: Path, chunk: int, native: bool) -> None:  # noqa: FBT001
    model = transformer(tmp_path, native=native)
    prompts = [random_ids(length) for length in (1, 4, 5, 13, 22)]
    found = climb(decider_of(model), prompts, tables_of(prompts), FULL, chunk)
    for prompt, logits in zip(prompts, found, strict=True):
        torch.testing.assert_close(torch.tensor(logits), plain(model, prompt), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_depth_of_every_family(tmp_path: Path, family: str) -> None:
    _, model = make(FAMILIES[family], tmp_path)
    prompts = [random_ids(length) for length in (3, 17)]
    found = climb(decider_of(model), prompts, tables_of(prompts), FULL, 2)
    for prompt, logits in zip(prompts, found, strict=True):
        torch.testing.assert_close(torch.tensor(logits), plain(model, prompt), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("native", NATIVE)
def test_a_prompt_that_stopped_goes_on_to_the_same_bits(
    tmp_path: Path,
    native: bool,  # noqa: FBT001
) -> None:
    """Whatever ran in between."""
    model = transformer(tmp_path, native=native)
    prompts = [random_ids(11), random_ids(9), random_ids(15)]
    tables = tables_of(prompts)
    at_once = climb(decider_of(model), prompts[:1], tables[:1], FULL)
    made = decider_of(model)
    climb(made, prompts[:1], tables[:1], range(1))
    climb(made, prompts[1:], tables[1:], FULL, 1)
    assert climb(made, prompts[:1], tables[:1], range(1, len(FULL))) == at_once


@torch.inference_mode()
def states_of(model: Transformer, prompt: Sequence[int]) -> Tensor:
    """States [positions, layers, d] of a plain pass after every layer."""
    states = torch.zeros(len(prompt), LAYERS, model.config.hidden_size)
    taps = Taps(states, array("q", range(len(prompt))), torch.arange(LAYERS, dtype=torch.int32))
    span = Span(range(len(prompt)), range(-(-len(prompt) // BLOCK)))
    rows = HostRows([span], BLOCK, model.rotary, CPU)
    hidden, cache = model.embed(torch.tensor(prompt)), new_cache(model)
    for segment in model.segments:
        hidden = segment(hidden, rows, cache, taps)
    return states


def normed(state: Tensor) -> Tensor:
    return state / (state.square().mean() + 1e-6).sqrt()


def heads_say(heads: DecisionHeads, layer: int, states: Tensor) -> Tensor:
    """What heads make of the states [positions, layers, d] of a plain pass."""
    place = heads.layers.index(layer)
    own = states[:, layer - 1]
    read = torch.cat((normed(own[-1]), normed(own.mean(0))))
    return heads.weight[place] @ read + heads.bias[place]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("task", TASKS)
def test_heads_read_the_last_state_and_the_mean(
    tmp_path: Path,
    task: str,
    chunk: int,
    native: bool,  # noqa: FBT001
) -> None:
    """After every layer that they have, the last one included."""
    model = transformer(tmp_path, native=native)
    prompts = [random_ids(length) for length in (1, 4, 5, 13, 22)]
    tables = tables_of(prompts)
    heads = TASKS[task].heads
    for segment, layer in enumerate((*CUTS, LAYERS)):
        if layer not in heads.layers:
            continue
        found = climb(decider_of(model), prompts, tables, range(segment + 1), chunk, task=task)
        for prompt, logits in zip(prompts, found, strict=True):
            wanted = heads_say(heads, layer, states_of(model, prompt))
            torch.testing.assert_close(torch.tensor(logits), wanted, rtol=1e-3, atol=1e-3)


def test_reads_of_all_kinds_share_a_step(tmp_path: Path) -> None:
    """Each gets its own answer, in the order of the reads."""
    model = transformer(tmp_path)
    prompts = [random_ids(6), random_ids(9)]
    tables = tables_of(prompts)
    made = decider_of(model)
    climb(made, prompts, tables, range(2))
    work = tuple(PromptRows(range(len(p)), t) for p, t in zip(prompts, tables, strict=True))
    kinds = [(1, (5, 7), None), (0, (0, 1, 2), "all"), (0, (7,), None), (1, (0, 1), "late")]
    reads = tuple(
        AnswerRead(index, tables[index], len(prompts[index]), candidates, task)
        for index, candidates, task in kinds
    )
    found = run(made, Decide(2, work, reads))
    logits = [plain(model, prompt) for prompt in prompts]
    states = [states_of(model, prompt) for prompt in prompts]
    wanted = [
        logits[1][[5, 7]],
        heads_say(TASKS["all"].heads, LAYERS, states[0]),
        logits[0][[7]],
        heads_say(TASKS["late"].heads, LAYERS, states[1]),
    ]
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(own), expected, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def their_embedding(theirs: Any, prompt: Sequence[int], pooling: Pooling) -> Tensor:
    """Transformers' states behind the final norm, pooled."""
    states: Tensor = theirs.model(input_ids=torch.tensor([list(prompt)])).last_hidden_state[0]
    return states.mean(0) if pooling is Pooling.MEAN else states[-1]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("pooling", Pooling)
def test_embeddings_are_transformers_states(
    tmp_path: Path,
    pooling: Pooling,
    chunk: int,
    native: bool,  # noqa: FBT001
) -> None:
    """However the prompts are cut into steps."""
    theirs, model = both(tmp_path, native=native)
    prompts = [random_ids(length) for length in (1, 4, 5, 13, 22)]
    made = decider_of(model)
    found = climb(made, prompts, tables_of(prompts), FULL, chunk, pooling=pooling)
    for prompt, vector in zip(prompts, found, strict=True):
        wanted = their_embedding(theirs, prompt, pooling)
        torch.testing.assert_close(torch.tensor(vector), wanted, rtol=1e-4, atol=1e-4)


class _Runner:
    """Carries out the steps of `Decisions`."""

    def __init__(self, decider: Decider) -> None:
        self.decider = decider
        self.copies = 0

    def run(self, step: Step) -> StepResult:
        assert isinstance(step, Decide)
        self.copies += len(step.copies)
        return StepResult(0.0, logits=run(self.decider, step))


def decisions_of(runner: _Runner, max_batched: int, blocks: int) -> Decisions:
    info = EngineInfo(
        model_name="small",
        num_layers=LAYERS,
        exit_layers=(),
        exit_thresholds=(),
        vocab_size=VOCAB,
        max_model_len=POSITIONS,
        block_size=BLOCK,
        num_blocks=blocks,
        max_num_seqs=1,
        dtype="float32",
        max_num_batched_tokens=max_batched,
        decision_layers=CUTS,
    )
    rows = RowPool(1)
    memory = SequenceMemory(
        BlockPool(blocks, BLOCK), rows, DebtLedger(rows, 1), prefix_caching=True
    )
    return Decisions(info, memory, runner)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("max_batched", [4, 10, 500])
@pytest.mark.parametrize("blocks", [24, 60])
def test_answers_do_not_depend_on_what_is_shared(
    tmp_path: Path,
    blocks: int,
    max_batched: int,
    native: bool,  # noqa: FBT001
) -> None:
    """Nor on the size of a step, on waves, or on who ran the cached blocks before, and how far."""
    model = transformer(tmp_path, native=native)
    runner = _Runner(decider_of(model, blocks))
    decisions = decisions_of(runner, max_batched, blocks)
    shared = random_ids(22)
    at_once, later = (0.0, NEVER), (NEVER, 0.0)
    asked: dict[str, tuple[AnswerRequest, ...]] = {}
    for name, length in (("a", 8), ("b", 13), ("c", 22), ("d", 22)):
        prompts = [(*shared[:length], *random_ids(1 + index)) for index in range(6)]
        labelled = name in "ac"
        asked[name] = (
            AnswerRequest(prompts[0], (0, 1, 2), "all", labelled, at_once),
            AnswerRequest(prompts[1], (0, 1, 2), "all", labelled, later),
            AnswerRequest(prompts[2], (0, 1), "late", not labelled, later),
            AnswerRequest(prompts[3], (5, 6, 9), "all" if name == "a" else None, name == "a"),
            AnswerRequest(prompts[4], (4, 1, 2), "all", labelled, (NEVER, NEVER)),
            AnswerRequest(prompts[5], (0, 1, 2), "all", labelled, at_once),
        )
    events = {}
    for name, reads in asked.items():
        decisions.add(DecisionRequest(name, reads), 0.0)
        if name in "bd":
            while decisions.has_work:
                ended, _ = decisions.advance(time.monotonic())
                events.update({event.request_id: event for event in ended})
    assert runner.copies
    for name, reads in asked.items():
        assert [answer.layer for answer in events[name].answers] == [1, 4, 4, 6, 6, 1]
        for read, answer in zip(reads, events[name].answers, strict=True):
            if read.task is None or (answer.layer == LAYERS and not read.labelled):
                wanted = plain(model, read.tokens)[list(read.candidates)]
            else:
                states = states_of(model, read.tokens)
                wanted = heads_say(TASKS[read.task].heads, answer.layer, states)
            found = torch.tensor(answer.logits)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("max_batched", [4, 10, 500])
def test_embeddings_do_not_depend_on_what_is_shared(
    tmp_path: Path,
    max_batched: int,
    native: bool,  # noqa: FBT001
) -> None:
    """Neither on blocks that others left, wherever they stopped, nor on those begun for others."""
    theirs, model = both(tmp_path, native=native)
    runner = _Runner(decider_of(model, 60))
    decisions = decisions_of(runner, max_batched, 60)
    shared = random_ids(22)
    left_early = AnswerRequest((*shared[:9], 3), (0, 1, 2), "all", True, (0.0, NEVER))
    decisions.add(DecisionRequest("early", (left_early,)), 0.0)
    asked: dict[str, list[AnswerRequest]] = {}
    for name, length in (("a", 14), ("b", 22), ("c", 7)):
        prompts = [(*shared[:length], *random_ids(1 + 3 * index)) for index in range(4)]
        asked[name] = [
            AnswerRequest(prompt, (), pooling=pooling) for prompt in prompts for pooling in Pooling
        ]
    events = {}
    for name, reads in asked.items():
        while decisions.has_work:
            decisions.advance(time.monotonic())
        decisions.add(DecisionRequest(name, tuple(reads)), 0.0)
        while name not in events:
            ended, _ = decisions.advance(time.monotonic())
            events.update({event.request_id: event for event in ended})
    assert runner.copies
    assert [events[name].stats.cached_tokens for name in asked] == [8, 12, 4]
    for name, reads in asked.items():
        for read, answer in zip(reads, events[name].answers, strict=True):
            assert read.pooling is not None
            wanted = their_embedding(theirs, read.tokens, read.pooling)
            found = torch.tensor(answer.logits)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def file_of(*tasks: DecisionTask, name: str = "model") -> DecisionFile:
    return DecisionFile(name, {task.name: task for task in tasks or TASKS.values()})


def load(folder: Path, path: Path, model: Transformer | None = None) -> DecisionFile:
    model = model or transformer(folder)
    return load_decision_heads(path, fingerprint="model", config=model.config)


def test_a_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "a.decisions.safetensors"
    file_of().save(path)
    found = load(tmp_path, path)
    assert list(found.tasks) == ["all", "late"]
    assert found.layers == (1, 4, LAYERS)
    for name, task in TASKS.items():
        own = found.tasks[name]
        assert torch.equal(own.heads.weight, task.heads.weight)
        assert torch.equal(own.heads.bias, task.heads.bias)
        assert own.heads.points == task.heads.points
        assert own.heads.layers == task.heads.layers
        assert replace(own, heads=task.heads) == task
    again = tmp_path / "b.decisions.safetensors"
    found.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert list(read_decision_metadata(path)["tasks"]) == ["all", "late"]


def changed(**change: Any) -> DecisionTask:
    return replace(TASKS["all"], heads=replace(TASKS["all"].heads, **change))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (changed(layers=(4, 1, LAYERS)), "ascending"),
        (changed(layers=(1, 1, LAYERS)), "ascending"),
        (changed(layers=(0, 4, LAYERS)), "ascending"),
        (changed(layers=(1, 4, LAYERS + 1)), f"up to {LAYERS}"),
        (changed(layers=(1, 4, 5)), "the last included"),
        (changed(layers=()), "the last included"),
        (changed(weight=torch.zeros(3, 3, WIDTH)), "the shape"),
        (changed(weight=torch.zeros(2, 3, 2 * WIDTH)), "the shape"),
        (changed(bias=torch.zeros(3, 2)), "the shape"),
        (changed(weight=torch.full((3, 3, 2 * WIDTH), torch.nan)), "not numbers"),
        (changed(points=(DecisionPoint(0.9, (0.5,), 1.0, 1.0),)), "1 thresholds for 2 layers"),
        (replace(TASKS["all"], labels=("yes", "no")), "the shape"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    tmp_path: Path, task: DecisionTask, message: str
) -> None:
    path = tmp_path / "a.decisions.safetensors"
    file_of(task).save(path)
    with pytest.raises(DecisionFileError, match=message):
        load(tmp_path, path)


def test_files_of_other_kinds_and_models_are_refused(tmp_path: Path) -> None:
    model = transformer(tmp_path)
    path = tmp_path / "a.decisions.safetensors"
    file_of(name="another").save(path)
    with pytest.raises(DecisionFileError, match="another model"):
        load(tmp_path, path, model)
    with pytest.raises(DecisionFileError, match="format"):
        load(tmp_path, tmp_path / "model.safetensors", model)
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(DecisionFileError, match="cannot be read"):
        load(tmp_path, path, model)


TASK: dict[str, Any] = {
    "layers": [1, LAYERS],
    "points": [],
    "wording": "So?",
    "labels": ["yes", "no"],
    "labelled": True,
    "scale": 1.0,
    "metrics": {},
}


def stored(path: Path, metadata: Mapping[str, str]) -> Path:
    tensors = {"0.weight": torch.zeros(2, 2, 2 * WIDTH), "0.bias": torch.zeros(2, 2)}
    save_file(tensors, path, {"format": FORMAT, "fingerprint": "model", **metadata})
    return path


def test_a_hand_made_file_is_read(tmp_path: Path) -> None:
    """So that the broken ones below are broken by their metadata alone."""
    path = stored(tmp_path / "a.decisions.safetensors", {"tasks": json.dumps({"a": TASK})})
    assert load(tmp_path, path).tasks["a"].labels == ("yes", "no")


@pytest.mark.parametrize(
    "tasks",
    [
        "",
        "{",
        "5",
        "[]",
        "[1]",
        "null",
        *map(
            json.dumps,
            [
                {"a": 5},
                {"a": []},
                {"a": {**TASK, "layers": None}},
                {"a": {**TASK, "layers": ["1", "2"]}},
                {"a": {**TASK, "labels": 5}},
                {"a": {**TASK, "points": [5]}},
                {"a": {**TASK, "points": [[0.9, [0.5], 1.0]]}},
                {"a": {**TASK, "points": [[0.9, ["x"], 1.0, 1.0]]}},
                {"a": TASK, "b": TASK},
            ],
        ),
        *(json.dumps({"a": {k: v for k, v in TASK.items() if k != name}}) for name in TASK),
    ],
)
def test_broken_metadata_is_refused(tmp_path: Path, tasks: str) -> None:
    path = stored(tmp_path / "a.decisions.safetensors", {"tasks": tasks})
    with pytest.raises(DecisionFileError, match=r"a\.decisions\.safetensors"):
        load(tmp_path, path)


def test_metadata_that_is_missing_is_told(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.decisions.safetensors", {})
    with pytest.raises(DecisionFileError, match="tasks"):
        load(tmp_path, path)
