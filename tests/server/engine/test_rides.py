"""Engines whose decoding is decided on the device against engines that decide step by step."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.models.config import Weights
from offramp.models.exits.file import ExitFile
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.families import config_from_hf
from offramp.models.loading.formats import as_they_are
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.sampling_params import ExitMode, ExitSettings, KVFill, SamplingParams
from offramp.models.transformer import Transformer
from offramp.server.config import EngineConfig
from offramp.server.engine.build import EngineConfigError, build_engine
from offramp.server.engine.bulk import Finished, run_all
from offramp.server.engine.engine import Engine
from offramp.server.engine.rebatching import Costs, Curve, Holds
from offramp.server.engine.request import FinishReason, GenerationRequest
from offramp.server.engine.rides import Rides, hold_shares
from offramp.server.engine.slot import Place

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
    folder: Path, exits: str, *, rides: bool, num_blocks: int = 200, **options: Any
) -> Engine:
    """An engine that checks its invariants after every step and lets every exit pay."""
    config = EngineConfig(
        exits=exits,
        device="cpu",
        kernels="torch",
        weights=Weights.FP32,
        max_model_len=128,
        max_num_seqs=8,
        block_size=8,
        exit_audit_rate=0.0,
        **options,
    )
    engine = build_engine(
        config, folder, model_name="test", num_blocks=num_blocks, rides=rides, audit=True
    )
    policy = engine.scheduler.policy
    object.__setattr__(policy, "asks", lambda *_: True)
    object.__setattr__(policy, "lets_go", lambda *_: True)
    return engine


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


def told(done: list[Finished]) -> list[tuple[list[int], list[int]]]:
    return [(item.token_ids, item.exit_layers) for item in done]


def rides_of(engine: Engine) -> Rides:
    rides = engine.scheduler.boarding.rides
    assert rides is not None
    return rides


@pytest.mark.parametrize("concurrency", [1, 8])
def test_rides_make_the_tokens_of_the_steps(tiny_dir: Path, exits: str, concurrency: int) -> None:
    """Token for token and layer for layer, requests that leave beside requests that do not."""
    asked = requests(14)
    steps = run_all(build(tiny_dir, exits, rides=False), asked, concurrency=concurrency)
    rides = run_all(build(tiny_dir, exits, rides=True), asked, concurrency=concurrency)
    assert told(rides) == told(steps)
    assert {layer for item in rides for layer in item.exit_layers} == {*EXITS, 4}
    for item in rides:
        assert item.stats is not None
        assert item.stats.layers_executed == sum(item.exit_layers)


def test_where_nothing_may_be_owed_nobody_leaves(tiny_dir: Path, exits: str) -> None:
    """As in steps: fills at once are fills, too."""
    engine = build(tiny_dir, exits, rides=True, max_exit_debt=0)
    always = replace(LEAVES, thresholds=(0.0, 0.0))
    found = run_all(engine, requests(4, always), concurrency=4)
    assert {layer for item in found for layer in item.exit_layers} == {4}


def test_exits_that_are_the_model_itself_ride_too(tiny_dir: Path) -> None:
    """LayerSkip's: an adapter of width one and a gate that always fires."""
    asked = requests(6, replace(LEAVES, thresholds=(0.3, 0.3)))
    steps = run_all(build(tiny_dir, "shared:1,3", rides=False), asked, concurrency=4)
    rides = run_all(build(tiny_dir, "shared:1,3", rides=True), asked, concurrency=4)
    assert told(rides) == told(steps)
    assert {layer for item in rides for layer in item.exit_layers} > {4}


def test_a_model_without_exits_rides_too(tiny_dir: Path) -> None:
    asked = requests(5, ExitSettings())
    steps = run_all(build(tiny_dir, "none", rides=False), asked, concurrency=4)
    rides = run_all(build(tiny_dir, "none", rides=True), asked, concurrency=4)
    assert told(rides) == told(steps)


def test_sampled_answers_are_made_again_by_their_seed(tiny_dir: Path, exits: str) -> None:
    """Whoever is beside them, and with the draws of steps where no filter reorders the tokens."""
    warm = [
        replace(each, sampling=replace(each.sampling, temperature=0.8, seed=7 * i))
        for i, each in enumerate(requests(8))
    ]
    together = run_all(build(tiny_dir, exits, rides=True), warm, concurrency=8)
    alone = run_all(build(tiny_dir, exits, rides=True), warm, concurrency=1)
    steps = run_all(build(tiny_dir, exits, rides=False), warm, concurrency=8)
    assert told(together) == told(alone) == told(steps)


def test_too_few_blocks_for_all(tiny_dir: Path, exits: str) -> None:
    """Some are sent back in the middle of their answer, and say the same in the end."""
    asked = requests(10)
    plenty = run_all(build(tiny_dir, exits, rides=True), asked, concurrency=8)
    tight = build(tiny_dir, exits, rides=True, num_blocks=16)
    found = run_all(tight, asked, concurrency=8)
    off = [told([item]) for item in found[::3]]
    assert off == [told([item]) for item in plenty[::3]]
    assert tight.scheduler.boarding.preemptions > 0
    assert tight.scheduler.memory.blocks.num_used == 0


def test_what_the_device_cannot_decide_is_decided_by_steps(tiny_dir: Path, exits: str) -> None:
    """Penalties, other fills and lossless requests share the engine with rides."""
    engine = build(tiny_dir, exits, rides=True)
    steps = build(tiny_dir, exits, rides=False)
    base = requests(1)[0]
    asked = [
        replace(base, request_id="biased", sampling=replace(GREEDY, logit_bias=((99, 50.0),))),
        replace(base, request_id="copied", exits=replace(LEAVES, kv_fill=KVFill.COPY)),
        replace(base, request_id="lossless", exits=ExitSettings(ExitMode.LOSSLESS)),
        replace(base, request_id="plain", exits=ExitSettings(ExitMode.OFF)),
    ]
    found = run_all(engine, asked, concurrency=4)
    assert told(found) == told(run_all(steps, asked, concurrency=4))
    assert found[0].token_ids == [99] * GREEDY.max_tokens
    assert found[2].token_ids == found[3].token_ids


def test_only_answers_ride(tiny_dir: Path, exits: str) -> None:
    """A request comes aboard with its first token and leaves when it is aborted."""
    engine = build(tiny_dir, exits, rides=True)
    rides = rides_of(engine)
    request = replace(requests(2)[1], sampling=replace(GREEDY, max_tokens=50))
    engine.add(request, time.monotonic())
    kinds = []
    while not len(rides):
        output = engine.step()
        assert output.stats is not None
        kinds.append(output.stats.kind)
    assert "ride" not in kinds
    slot = next(iter(engine.scheduler.live.values()))
    assert slot.place is Place.ABOARD
    outputs = [engine.step() for _ in range(6)]
    assert [output.stats.kind for output in outputs if output.stats] == ["ride"] * 6
    assert [len(output.events) for output in outputs] == [0, 1, 1, 1, 1, 1]
    engine.abort(request.request_id)
    last = engine.step()
    assert [event.finish_reason for event in last.events] == [FinishReason.ABORT]
    assert not len(rides)
    assert not engine.has_work


def test_an_answer_that_left_early_is_not_shared(tiny_dir: Path, exits: str) -> None:
    """Its K,V are not what full depth makes, so a follow-up finds the prompt's alone."""
    engine = build(tiny_dir, exits, rides=True)
    prompt = tuple(range(60, 84))
    always = replace(LEAVES, thresholds=(0.0, 0.0))
    sampling = replace(GREEDY, max_tokens=24)
    first = run_all(engine, [GenerationRequest("1", prompt, sampling, always)], concurrency=1)[0]
    assert first.exit_layers == [4, *[1] * 23]
    again = GenerationRequest("2", (*prompt, *first.token_ids), sampling, ExitSettings())
    found = run_all(engine, [again], concurrency=1)[0]
    assert found.stats is not None
    assert found.stats.cached_tokens == len(prompt)
    fresh = run_all(build(tiny_dir, exits, rides=True), [again], concurrency=1)[0]
    assert found.token_ids == fresh.token_ids


@pytest.mark.parametrize("own", [None, (0.0, 0.0)], ids=["the server's", "its own"])
def test_new_thresholds_reach_those_aboard(
    tiny_dir: Path, exits: str, own: tuple[float, ...] | None
) -> None:
    """The guard closes the exits while a request is on its way, whoever named its thresholds."""
    engine = build(tiny_dir, exits, rides=True)
    targets = engine.scheduler.targets
    # Where the server's own exits are closed already, they do not change.
    object.__setattr__(targets, "_default", (0.0, 0.0) if own is None else (1.01, 1.01))
    asked = ExitSettings(ExitMode.ADAPTIVE, thresholds=own, kv_fill=KVFill.PROJECT)
    sampling = replace(GREEDY, max_tokens=30)
    engine.add(GenerationRequest("a", tuple(range(60, 70)), sampling, asked), time.monotonic())
    layers: list[int] = []
    while len(layers) < 8:
        layers += [layer for event in engine.step().events for layer in event.exit_layers]
    assert set(layers[1:]) == {1}
    for _ in range(3):
        targets.tighten()
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
    plain = run_all(build(tiny_dir, exits, rides=True), asked, concurrency=8)
    engine = build(tiny_dir, exits, rides=True, exit_hold="throughput", exit_max_hold_ms=500)
    rebatching = rides_of(engine)._rebatching
    assert rebatching is not None
    # Segments that cost the same for one rider as for many: company is what saves time.
    costs = Costs((Curve((1,), (1.0,)),) * 3, (Curve((1,), (0.0,)),) * 2)
    monkeypatch.setattr(rebatching, "_costs", costs)
    loop, chosen = rides_of(engine)._loop, []
    hold = loop.hold

    def note(holds: Holds) -> None:
        chosen.append(holds[1][0])
        hold(holds)

    monkeypatch.setattr(loop, "hold", note)
    assert told(run_all(engine, asked, concurrency=8)) == told(plain)
    assert max(chosen) > 0


def test_throughput_is_for_gpus(tiny_dir: Path) -> None:
    with pytest.raises(EngineConfigError, match="use --exit-hold latency"):
        build(tiny_dir, "none", rides=False, exit_hold="throughput")


def test_holding_pays_where_what_is_above_is_dear() -> None:
    """Two of ten ready ones are kept waiting by a pass of 9 above, not by one of the ground's."""
    assert hold_shares([(1.0, 1.0), (1.0, 1.0)], 5) == [(0.0, 0.0), (0.0, 5)]
    assert hold_shares([(1.0, 1.0), (4.0, 5.0), (4.0, 4.0)], 2) == [(0.0, 0.0), (4.0, 2), (1.5, 2)]
