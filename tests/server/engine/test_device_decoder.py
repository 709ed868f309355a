"""Engines whose decoding is decided on the device against engines that decide step by step."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.models.config import Weights
from offramp.models.costs import CostModel, StepCost
from offramp.models.exits.draft_head import VECTORS, DraftFile, DraftHead
from offramp.models.exits.file import ExitFile
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.families import config_from_hf
from offramp.models.loading.formats import as_they_are
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.sampling_params import (
    DraftSource,
    ExitMode,
    ExitSettings,
    KVFill,
    SamplingParams,
)
from offramp.models.transformer import Transformer
from offramp.server.config import EngineConfig
from offramp.server.engine.batch_delay import Holds
from offramp.server.engine.build import build_engine
from offramp.server.engine.device_decoder import DeviceDecoder
from offramp.server.engine.engine import Engine
from offramp.server.engine.governor import ExitGovernor, HeadPlan
from offramp.server.engine.host_decoder import HostDecoder
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import FinishReason, GenerationRequest
from offramp.server.engine.thresholds import ExitThresholds
from offramp.server.errors import EngineConfigError

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
LEAVES = ExitSettings(ExitMode.ADAPTIVE, thresholds=(0.55, 0.45), kv_fill=KVFill.PROJECT)
EXITS = (1, 3)


@pytest.fixture(scope="module")
def exits(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random exits whose scores spread over 0 to 1."""
    torch.manual_seed(1)
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    model = Transformer(config, weights, EXITS, 8, as_they_are())
    heads = tuple(new_head(e, model, TrainOptions(width=16, router=8)) for e in EXITS)
    for head in heads:
        for tensor in (head.down, head.router_down, head.router_down_bias):
            tensor.normal_()
    path = tmp_path_factory.mktemp("exits") / "exits.safetensors"
    ExitFile(fingerprint(weights), heads, {}, {}).save(path)
    return str(path)


def build(
    folder: Path,
    exits: str,
    *,
    on_device: bool,
    num_blocks: int = 200,
    every_exit: bool = True,
    **options: Any,
) -> Engine:
    """An engine that checks its invariants after every step.

    ``on_device`` it is on a GPU, if there is one.
    """
    on_gpu = on_device and torch.cuda.is_available()
    config = EngineConfig(
        exits=exits,
        device="cuda" if on_gpu else "cpu",
        dtype="float32",
        kernels="auto" if on_gpu else "torch",
        weights=Weights.AUTO if on_gpu else Weights.FP32,
        max_model_len=128,
        max_num_seqs=8,
        block_size=8,
        exit_audit_rate=0.0,
        **options,
    )
    return build_engine(
        config,
        folder,
        model_name="test",
        num_blocks=num_blocks,
        on_device=on_device,
        every_exit=every_exit,
        check_invariants=True,
    )


def requests(count: int, exits: ExitSettings = LEAVES) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [
        GenerationRequest(
            str(i),
            tuple(torch.randint(60, 300, (length,), generator=generator).tolist()),
            replace(GREEDY, max_tokens=3 + 4 * (i % 6)),
            exits if i % 3 else ExitSettings(ExitMode.OFF),
        )
        for i, length in enumerate(lengths)
    ]


def texts(done: list[Finished]) -> list[tuple[list[int], list[int]]]:
    return [(item.token_ids, item.exit_layers) for item in done]


def device_of(engine: Engine) -> DeviceDecoder:
    found = engine.decoders[0]
    assert isinstance(found, DeviceDecoder)
    return found


@pytest.mark.parametrize("concurrency", [1, 8])
def test_passes_make_the_tokens_of_the_steps(tiny_dir: Path, exits: str, concurrency: int) -> None:
    """Token for token and layer for layer, requests that leave beside requests that do not."""
    asked = requests(14)
    steps = run_all(build(tiny_dir, exits, on_device=False), asked, concurrency=concurrency)
    passes = run_all(build(tiny_dir, exits, on_device=True), asked, concurrency=concurrency)
    assert texts(passes) == texts(steps)
    assert {layer for item in passes for layer in item.exit_layers} == {*EXITS, 4}
    for item in passes:
        assert item.stats is not None
        assert item.stats.layers_executed == sum(item.exit_layers)
        assert item.stats.passes == item.exit_layers.count(4)


def test_where_nothing_may_be_owed_no_token_leaves(tiny_dir: Path, exits: str) -> None:
    """As in steps: fills at once are fills, too."""
    engine = build(tiny_dir, exits, on_device=True, max_exit_debt=0)
    always = replace(LEAVES, thresholds=(0.0, 0.0))
    found = run_all(engine, requests(4, always), concurrency=4)
    assert {layer for item in found for layer in item.exit_layers} == {4}


def test_exits_that_are_the_model_itself_work_too(tiny_dir: Path) -> None:
    """LayerSkip's: an adapter of width one and a gate that always fires."""
    asked = requests(6, replace(LEAVES, thresholds=(0.3, 0.3)))
    steps = run_all(build(tiny_dir, "shared:1,3", on_device=False), asked, concurrency=4)
    passes = run_all(build(tiny_dir, "shared:1,3", on_device=True), asked, concurrency=4)
    assert texts(passes) == texts(steps)
    assert {layer for item in passes for layer in item.exit_layers} > {4}


def test_a_model_without_exits_works_too(tiny_dir: Path) -> None:
    asked = requests(5, ExitSettings())
    steps = run_all(build(tiny_dir, "none", on_device=False), asked, concurrency=4)
    passes = run_all(build(tiny_dir, "none", on_device=True), asked, concurrency=4)
    assert texts(passes) == texts(steps)


@pytest.fixture(scope="module")
def draft_head(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A draft head with random weights."""
    torch.manual_seed(2)
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    width, layers = config.hidden_size, (1, 3, 4)
    shapes = {name: weights[f"layers.3.{name}"].shape for name in ("qkv", "o", "gate_up", "down")}
    shapes |= {"fuse": torch.Size((width, 4 * width)), "feedback": torch.Size((width, 2 * width))}
    matrices = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    norms = dict.fromkeys(VECTORS, torch.ones(width))
    head = DraftHead(layers, **matrices, **norms, vocab=torch.arange(config.vocab_size))
    chances = tuple((0.1, 0.9) for _ in range(10))
    path = tmp_path_factory.mktemp("head") / "head.draft.safetensors"
    DraftFile(fingerprint(weights), head, chances, {}, {}).save(path)
    return str(path)


def test_lossless_requests_are_guessed_for_beside_passes(
    tiny_dir: Path, exits: str, draft_head: str
) -> None:
    """By a draft head that is named, while the device decodes the others."""
    lossless = ExitSettings(ExitMode.LOSSLESS)
    asked = [replace(r, exits=r.exits if i % 2 else lossless) for i, r in enumerate(requests(14))]
    off = [replace(r, exits=ExitSettings(ExitMode.OFF)) for r in asked]
    steps = run_all(build(tiny_dir, exits, on_device=False, draft_head="none"), off, concurrency=8)
    engine = build(tiny_dir, exits, on_device=True, draft_head=draft_head)
    host = engine.decoders[-1]
    assert isinstance(host, HostDecoder)
    plan = HeadPlan(3, 0.0, (-1.0,) * 3, spared=0.9)
    host.governor.head_plan = lambda rows, luck=1.0: plan  # type: ignore[method-assign]
    host.governor.guesses_spare = lambda rows, *, sampled: 0.9  # type: ignore[method-assign]
    found = run_all(engine, asked, concurrency=8)
    for request, mixed, alone in zip(asked, found, steps, strict=True):
        assert mixed.stats is not None
        if request.exits.mode is not ExitMode.ADAPTIVE:
            assert mixed.token_ids == alone.token_ids
        guessed = DraftSource.HEAD in mixed.stats.drafts
        assert guessed == (request.exits is lossless)
    assert not build(tiny_dir, exits, on_device=True).info.draft_head


FILTERS: list[dict[str, float]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"top_p": 0.9, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"top_k": 30, "repetition_penalty": 1.3},
]


def sampled(count: int) -> list[GenerationRequest]:
    """Requests with every kind of filter, with penalties and without, each with its seed."""
    return [
        replace(
            each,
            sampling=replace(
                each.sampling,
                temperature=0.8 + 0.1 * (i % 3),
                seed=7 * i,
                **FILTERS[i % len(FILTERS)],  # type: ignore[arg-type]
            ),
        )
        for i, each in enumerate(requests(count))
    ]


def test_sampled_answers_are_made_again_by_their_seed(tiny_dir: Path, exits: str) -> None:
    """Whatever runs beside them, and on the device with the draws of the host."""
    warm = sampled(14)
    together = run_all(build(tiny_dir, exits, on_device=True), warm, concurrency=8)
    alone = run_all(build(tiny_dir, exits, on_device=True), warm, concurrency=1)
    steps = run_all(build(tiny_dir, exits, on_device=False), warm, concurrency=8)
    assert texts(together) == texts(alone) == texts(steps)
    greedy = [replace(each, sampling=replace(each.sampling, temperature=0.0)) for each in warm]
    assert texts(run_all(build(tiny_dir, exits, on_device=False), greedy, concurrency=8)) != texts(
        steps
    )


def test_sampled_answers_survive_preemption(tiny_dir: Path, exits: str) -> None:
    """At full depth: what was prefilled again goes on with the draws it would have had."""
    warm = [replace(each, exits=ExitSettings(ExitMode.OFF)) for each in sampled(14)]
    steps = run_all(build(tiny_dir, exits, on_device=False), warm, concurrency=8)
    for on_device in (False, True):
        tight = build(tiny_dir, exits, on_device=on_device, num_blocks=16)
        assert texts(run_all(tight, warm, concurrency=8)) == texts(steps)
        assert tight.admission.preemptions > 0


@pytest.mark.parametrize("top", [0.0, 1.0], ids=["cheap above", "dear above"])
def test_exits_that_do_not_pay_are_not_taken(tiny_dir: Path, exits: str, top: float) -> None:
    """Where the layers above cost nothing tokens run them, but for a probe now and then."""
    engine = build(tiny_dir, exits, on_device=True, every_exit=False)
    costs = device_of(engine).governor.costs
    costs.segments = [StepCost.of({1: 1.0, 8: 1.0}), *[StepCost.of({1: top, 8: top})] * 2]
    costs.checks = [StepCost.of({1: 0.01, 8: 0.01}) for _ in range(3)]
    always = replace(LEAVES, thresholds=(0.0, 0.0))
    request = GenerationRequest("a", (60, 61), replace(GREEDY, max_tokens=60), always)
    layers = run_all(engine, [request], concurrency=1)[0].exit_layers
    if top:
        assert layers == [4] + [1] * 59
    else:
        assert 0 < len(layers) - layers.count(4) <= 4


def test_too_few_blocks_for_all(tiny_dir: Path, exits: str) -> None:
    """Some are sent back in the middle of their answer, and make the same tokens in the end."""
    asked = requests(10)
    plenty = run_all(build(tiny_dir, exits, on_device=True), asked, concurrency=8)
    tight = build(tiny_dir, exits, on_device=True, num_blocks=16)
    found = run_all(tight, asked, concurrency=8)
    off = [texts([item]) for item in found[::3]]
    assert off == [texts([item]) for item in plenty[::3]]
    assert tight.admission.preemptions > 0
    assert tight.memory.blocks.num_used == 0


def test_what_the_device_cannot_decide_is_decided_by_steps(tiny_dir: Path, exits: str) -> None:
    """Penalties, other fills and lossless requests share the engine with the device."""
    engine = build(tiny_dir, exits, on_device=True)
    steps = build(tiny_dir, exits, on_device=False)
    base = requests(1)[0]
    asked = [
        replace(base, request_id="biased", sampling=replace(GREEDY, logit_bias=((99, 50.0),))),
        replace(base, request_id="copied", exits=replace(LEAVES, kv_fill=KVFill.COPY)),
        replace(base, request_id="lossless", exits=ExitSettings(ExitMode.LOSSLESS)),
        replace(base, request_id="plain", exits=ExitSettings(ExitMode.OFF)),
    ]
    found = run_all(engine, asked, concurrency=4)
    assert texts(found) == texts(run_all(steps, asked, concurrency=4))
    assert found[0].token_ids == [99] * GREEDY.max_tokens
    assert found[2].token_ids == found[3].token_ids


def test_only_answers_are_decoded_there(tiny_dir: Path, exits: str) -> None:
    """A request is added with its first token and removed when it is aborted."""
    engine = build(tiny_dir, exits, on_device=True)
    device = device_of(engine)
    request = replace(requests(2)[1], sampling=replace(GREEDY, max_tokens=50))
    engine.add(request, time.monotonic())
    kinds = []
    while not device.sequence_ids():
        output = engine.step()
        assert output.stats is not None
        kinds.append(output.stats.kind)
    assert "device" not in kinds
    sequence = next(iter(engine.admission.running.values()))
    assert sequence.decoder is device
    outputs = [engine.step() for _ in range(6)]
    assert [output.stats.kind for output in outputs if output.stats] == ["device"] * 6
    assert [len(output.events) for output in outputs] == [0, 1, 1, 1, 1, 1]
    engine.abort(request.request_id)
    last = engine.step()
    assert [event.finish_reason for event in last.events] == [FinishReason.ABORT]
    assert not device.sequence_ids()
    assert not engine.has_work


def test_an_answer_that_left_early_is_not_shared(tiny_dir: Path, exits: str) -> None:
    """Its K,V are not what full depth makes, so a follow-up finds the prompt's alone."""
    engine = build(tiny_dir, exits, on_device=True)
    prompt = tuple(range(60, 84))
    always = replace(LEAVES, thresholds=(0.0, 0.0))
    sampling = replace(GREEDY, max_tokens=24)
    first = run_all(engine, [GenerationRequest("1", prompt, sampling, always)], concurrency=1)[0]
    assert first.exit_layers == [4, *[1] * 23]
    again = GenerationRequest("2", (*prompt, *first.token_ids), sampling, ExitSettings())
    found = run_all(engine, [again], concurrency=1)[0]
    assert found.stats is not None
    assert found.stats.cached_tokens == len(prompt)
    fresh = run_all(build(tiny_dir, exits, on_device=True), [again], concurrency=1)[0]
    assert found.token_ids == fresh.token_ids


@pytest.mark.parametrize("own", [None, (0.0, 0.0)], ids=["the server's", "its own"])
def test_new_thresholds_reach_running_requests(
    tiny_dir: Path, exits: str, own: tuple[float, ...] | None
) -> None:
    """The guard closes the exits while a request is on its way, whoever named its thresholds."""
    engine = build(tiny_dir, exits, on_device=True)
    thresholds = engine.thresholds
    # Where the server's own exits are closed already, they do not change.
    object.__setattr__(thresholds, "_default", (0.0, 0.0) if own is None else (1.01, 1.01))
    asked = ExitSettings(ExitMode.ADAPTIVE, thresholds=own, kv_fill=KVFill.PROJECT)
    sampling = replace(GREEDY, max_tokens=30)
    engine.add(GenerationRequest("a", tuple(range(60, 70)), sampling, asked), time.monotonic())
    layers: list[int] = []
    while len(layers) < 8:
        layers += [layer for event in engine.step().events for layer in event.exit_layers]
    assert set(layers[1:]) == {1}
    for _ in range(3):
        thresholds.tighten()
    while engine.has_work:
        layers += [layer for event in engine.step().events for layer in event.exit_layers]
    assert set(layers[10:]) == {4}


def test_for_throughput_deep_tokens_wait_and_say_the_same(
    tiny_dir: Path, exits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds are chosen anew every few hundred tokens, from the depths seen."""
    shallow = replace(LEAVES, thresholds=(0.0, 0.0))
    asked = [
        replace(each, sampling=replace(GREEDY, max_tokens=70), exits=shallow if i % 4 else LEAVES)
        for i, each in enumerate(requests(24))
    ]
    plain = run_all(build(tiny_dir, exits, on_device=True), asked, concurrency=8)
    engine = build(tiny_dir, exits, on_device=True, exit_hold="throughput", exit_max_hold_ms=500)
    delay = device_of(engine).governor.delay
    assert delay is not None
    # Segments that cost the same for one row as for many: larger batches are what saves time.
    costs = CostModel.of(3)
    costs.segments = [StepCost.of({1: 1.0}) for _ in range(3)]
    monkeypatch.setattr(delay, "_costs", costs)
    loop, chosen = device_of(engine)._loop, []
    hold = loop.hold

    def note(holds: Holds) -> None:
        chosen.append(holds[1][0])
        hold(holds)

    monkeypatch.setattr(loop, "hold", note)
    assert texts(run_all(engine, asked, concurrency=8)) == texts(plain)
    assert max(chosen) > 0


def test_throughput_is_for_gpus(tiny_dir: Path) -> None:
    with pytest.raises(EngineConfigError, match="use --exit-hold latency"):
        build(tiny_dir, "none", on_device=False, exit_hold="throughput")


def test_holding_pays_where_what_is_above_is_dear() -> None:
    """Two of ten ready ones are kept waiting by a pass of 9 above, not by one of the ground's."""

    def holds(seconds: list[tuple[float, float]], passes: float) -> Holds:
        costs = CostModel.of(len(seconds))
        costs.segments = [StepCost.of({1: one, 8: many}) for one, many in seconds]
        longest = passes * sum(many for _, many in seconds)
        return ExitGovernor(costs, ExitThresholds(()), longest).device_holds(8)

    assert holds([(1.0, 1.0), (1.0, 1.0)], 5) == [(0.0, 0.0), (0.0, 5)]
    assert holds([(1.0, 1.0), (4.0, 5.0), (4.0, 4.0)], 2) == [(0.0, 0.0), (4.0, 2), (1.5, 2)]
