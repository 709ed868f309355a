"""The engine's invariants (design: invariants 1 to 5) under arbitrary interleavings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from offramp.models.costs import CostModel, StepCost
from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import (
    ExitCriterion,
    ExitMode,
    ExitSettings,
    KVFill,
    SamplingParams,
)
from offramp.server.engine import draft_trials
from offramp.server.engine.admission import Admission
from offramp.server.engine.batch_delay import BatchDelay
from offramp.server.engine.blocks import BlockPool, SequenceMemory
from offramp.server.engine.build import hidden_rows
from offramp.server.engine.decisions import Decisions
from offramp.server.engine.decoder import Decoder
from offramp.server.engine.device_decoder import DeviceDecoder
from offramp.server.engine.engine import Engine
from offramp.server.engine.governor import NO_DRAFTS, ExitGovernor, HeadPlan
from offramp.server.engine.guard import LiveGuard
from offramp.server.engine.host_decoder import HostDecoder
from offramp.server.engine.kv_debt import DebtLedger, RowPool
from offramp.server.engine.request import (
    EngineInfo,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)
from offramp.server.engine.thresholds import ExitThresholds

from .fake_device import FakeLoop
from .fake_runner import (
    MAY_GUESS,
    MUST_BE_EXACT,
    FakeGrammar,
    FakeRunner,
    expected_answer,
    expected_logprobs,
)

LAYERS = 12
# One of each kind: without memory, with memory of the exits below, one depth for the answer.
CRITERIA = (ExitCriterion.TWO_KEY, ExitCriterion.PATIENCE, ExitCriterion.PROMPT_DEPTH)
CONTEXT = 40
BLOCK = 4


def fake_engine(
    *,
    exit_layers: tuple[int, ...] = (5, 8),
    num_blocks: int = 14,
    max_num_seqs: int = 4,
    max_batched: int = 7,
    max_debt: int = 3,
    max_hold: float = 0.0,
    leave_share: float = 0.5,
    caching: bool = True,
    audit_rate: float = 0.0,
    on_device: bool = False,
    every_exit: bool = False,
    drafts: bool = False,
    seed: int = 0,
    runner: FakeRunner | None = None,
    thresholds: ExitThresholds | None = None,
) -> tuple[Engine, FakeRunner]:
    """A real engine over a fake runner, its invariants checked after every step.

    With ``on_device`` decoding is decided on a fake device, as on a GPU. With ``drafts`` there is a
    draft head, which pays most of the time.
    """
    segments = len(exit_layers) + 1
    info = EngineInfo(
        "fake",
        LAYERS,
        exit_layers,
        (0.5,) * len(exit_layers),
        50,
        CONTEXT,
        BLOCK,
        num_blocks,
        max_num_seqs,
        "none",
        max_batched,
        max_debt,
        head_chances=((0.1, 0.5),) * 10 if drafts else (),
    )
    rows = RowPool(hidden_rows(info))
    memory = SequenceMemory(
        BlockPool(num_blocks, BLOCK), rows, DebtLedger(rows, segments), prefix_caching=caching
    )
    thresholds = thresholds or ExitThresholds(info.exit_thresholds)
    admission = Admission(info, memory)
    runner = runner or FakeRunner(segments, BLOCK, leave_share, seed)
    costs = CostModel.of(segments)
    governor = ExitGovernor(costs, thresholds, max_hold, every_exit=every_exit)
    if drafts:
        plan = HeadPlan(3, 0.0, (0.0,) * 3)
        pays = Random(seed)

        def head_plan(rows: int, luck: float = 1.0) -> HeadPlan:
            return plan if pays.random() < 0.7 else NO_DRAFTS

        def exits_save(rows: int, beyond: float = 0.0) -> bool:
            return every_exit or pays.random() < 0.5

        governor.head_plan = head_plan  # type: ignore[method-assign]
        governor.exits_save = exits_save  # type: ignore[method-assign]
    decoders: list[Decoder] = [
        HostDecoder(info, admission, memory, governor, runner, alone=not on_device)
    ]
    if on_device:
        loop = FakeLoop(runner, BLOCK, exit_layers, LAYERS)
        costs = CostModel.of(segments)
        costs.segments = [StepCost.of({1: 1.0}) for _ in range(segments)]
        delay = BatchDelay(costs, 2.0, (*exit_layers, LAYERS))
        governor = ExitGovernor(costs, thresholds, max_hold, delay, every_exit=every_exit)
        decoders.insert(0, DeviceDecoder(info, admission, memory, governor, loop))
    guard = LiveGuard(thresholds, audit_rate)
    decisions = Decisions(info, memory, runner)
    engine = Engine(info, admission, memory, decoders, decisions, guard, check_invariants=True)
    return engine, runner


def host_of(engine: Engine) -> HostDecoder:
    """The decoder that decides on the host."""
    found = engine.decoders[-1]
    assert isinstance(found, HostDecoder)
    return found


def request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int,
    mode: ExitMode = ExitMode.OFF,
    fill: KVFill = KVFill.PROJECT,
    stop: frozenset[int] = frozenset(),
    criterion: ExitCriterion = ExitCriterion.TWO_KEY,
    *,
    prefill: bool = False,
    scores: bool = False,
    form: int | None = None,
) -> GenerationRequest:
    """A greedy request, marked where its K,V have to be exact and where exits may guess wrong.

    With ``scores`` log-probabilities are wanted, of the prompt too. With ``form`` a grammar ends
    the answer after so many tokens.
    """
    prefill = prefill and not scores
    seed = 0
    if mode is ExitMode.LOSSLESS:
        prefill, seed = False, MAY_GUESS
    elif mode is ExitMode.OFF or (fill is KVFill.RECOMPUTE and not prefill):
        seed = MUST_BE_EXACT
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        stop_token_ids=stop,
        seed=seed,
        logprobs=0 if scores else None,
        prompt_logprobs=0 if scores else None,
    )
    grammar = None if form is None else FakeGrammar(expected_answer(prompt, CONTEXT), form)
    bound = 0.5 if prefill else None
    exits = ExitSettings(mode, criterion, kv_fill=fill, prefill_threshold=bound)
    return GenerationRequest(name, tuple(prompt), sampling, exits, grammar)


def content_with_coarse(exits: int) -> ExitThresholds:
    """Thresholds by which requests that name nothing take inputs of 8 bits."""
    point = OperatingPoint(
        quality=0.9,
        confidence=0.95,
        criterion=ExitCriterion.TWO_KEY,
        kv_fill=KVFill.PROJECT,
        thresholds=(0.5,) * exits,
        agreement=0.95,
        layers_skipped=0.1,
        mean_depth=9.0,
        prompts=10,
        tokens=100,
    )
    thresholds = ExitThresholds((0.5,) * exits, [point], 0.9)
    thresholds.allow_coarse(0.9, 1.25)
    return thresholds


class EngineMachine(RuleBasedStateMachine):
    """Adds, steps and aborts in any order; every answer must be the only right one."""

    @initialize(
        exits=st.sampled_from([(), (6,), (5, 8), (3, 6, 9)]),
        num_blocks=st.integers(10, 20),
        max_batched=st.integers(2, 12),
        max_debt=st.integers(0, 4),
        leave_share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        caching=st.booleans(),
        max_hold=st.sampled_from([0.0, 10.0]),
        audit_rate=st.sampled_from([0.0, 0.5, 1.0]),
        on_device=st.booleans(),
        drafts=st.booleans(),
        coarse=st.booleans(),
        seed=st.integers(0, 5),
    )
    def build(
        self,
        exits: tuple[int, ...],
        num_blocks: int,
        max_batched: int,
        max_debt: int,
        leave_share: float,
        caching: bool,  # noqa: FBT001 (drawn by hypothesis)
        max_hold: float,
        audit_rate: float,
        on_device: bool,  # noqa: FBT001 (drawn by hypothesis)
        drafts: bool,  # noqa: FBT001 (drawn by hypothesis)
        coarse: bool,  # noqa: FBT001 (drawn by hypothesis)
        seed: int,
    ) -> None:
        """An engine of arbitrary sizes; some requests are content with ``coarse`` inputs."""
        # Kernels of GPUs take no such inputs.
        self.coarse = coarse and not on_device
        thresholds = content_with_coarse(len(exits)) if self.coarse else None
        self.engine, self.runner = fake_engine(
            exit_layers=exits,
            num_blocks=num_blocks,
            max_batched=max_batched,
            max_debt=max_debt,
            max_hold=max_hold,
            leave_share=leave_share,
            caching=caching,
            audit_rate=audit_rate,
            on_device=on_device,
            drafts=drafts,
            seed=seed,
            thresholds=thresholds,
        )
        self.requests: dict[str, GenerationRequest] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        max_tokens=st.integers(1, 14),
        mode=st.sampled_from(ExitMode),
        fill=st.sampled_from(KVFill),
        stop=st.frozensets(st.integers(0, 49), max_size=3),
        criterion=st.sampled_from(CRITERIA),
        prefill=st.booleans(),
        scores=st.booleans(),
        form=st.none() | st.integers(1, 14),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "", "x"]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        mode: ExitMode,
        fill: KVFill,
        stop: frozenset[int],
        criterion: ExitCriterion = ExitCriterion.TWO_KEY,
        prefill: bool = False,  # noqa: FBT001, FBT002 (drawn by hypothesis)
        scores: bool = False,  # noqa: FBT001, FBT002 (drawn by hypothesis)
        form: int | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> None:
        """A new request; two-letter prompts make prefix hits common."""
        name = str(len(self.requests))
        wishes = {"prefill": prefill, "scores": scores}
        item = request(name, prompt, max_tokens, mode, fill, stop, criterion, form=form, **wishes)
        item = replace(item, priority=priority, cache_salt=salt)
        self.requests[item.request_id] = item
        self.events[item.request_id] = []
        self.engine.add(item, time.monotonic())

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), mode=st.sampled_from(ExitMode), fill=st.sampled_from(KVFill))
    def follow_up(self, data: st.DataObject, mode: ExitMode, fill: KVFill) -> None:
        """The next turn of a conversation: its prompt holds an earlier answer."""
        first = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        answer = [t for event in self.events[first.request_id] for t in event.token_ids]
        self.add([*first.prompt, *answer, 0][: CONTEXT - 2], 6, mode, fill, frozenset())

    @rule(steps=st.integers(1, 9))
    def step(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self._step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Abort any request, ended ones included."""
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.aborted.add(name)
        self.engine.abort(name)

    def teardown(self) -> None:
        """Run to the end and judge every answer."""
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.engine.has_work:
                break
            self._step()
        assert not self.engine.has_work
        for name, item in self.requests.items():
            self._judge(name, item)
        memory = self.engine.memory
        assert memory.blocks.num_used == 0
        assert memory.rows.num_free == memory.rows.num_rows
        assert memory.ledger.total == 0
        # Every exit of the fake model is right in adaptive mode.
        assert self.engine.guard.disagreements == 0

    def _step(self) -> None:
        for event in self.engine.step().events:
            self.events[event.request_id].append(event)

    def _judge(self, name: str, item: GenerationRequest) -> None:
        events = self.events[name]
        assert [event.finish_reason is not None for event in events] == [
            *[False] * (len(events) - 1),
            True,
        ]
        tokens = [token for event in events for token in event.token_ids]
        layers = [layer for event in events for layer in event.exit_layers]
        assert len(layers) == len(tokens)
        assert tokens == expected_answer(item.prompt, len(tokens))
        coarse = events[-1].stats.coarse
        assert coarse <= (self.coarse and item.exits.mode is ExitMode.ADAPTIVE)
        if coarse:
            assert set(layers) <= {LAYERS}
        if item.exits.mode is not ExitMode.ADAPTIVE:
            assert set(layers) <= {LAYERS}
        if item.sampling.logprobs is not None and tokens:
            every = expected_logprobs([*item.prompt, *tokens])
            prompt = [own for event in events for own in event.prompt_logprobs]
            answer = [own for event in events for own in event.logprobs]
            assert prompt + answer == every
        if events[-1].finish_reason is FinishReason.ABORT:
            assert name in self.aborted
        else:
            self._judge_ending(item, tokens, events[-1])

    @staticmethod
    def _judge_ending(item: GenerationRequest, tokens: list[int], last: TokenEvent) -> None:
        stops = [i for i, token in enumerate(tokens) if token in item.sampling.stop_token_ids]
        full = min(item.sampling.max_tokens, CONTEXT - len(item.prompt))
        form = item.grammar.length if isinstance(item.grammar, FakeGrammar) else None
        if stops:
            assert stops == [len(tokens) - 1]
            assert last.finish_reason is FinishReason.STOP
        elif form is not None and form <= full:
            assert len(tokens) == form
            assert last.finish_reason is FinishReason.STOP
        else:
            assert len(tokens) == full
            assert last.finish_reason is FinishReason.LENGTH
        plain = item.exits.mode is ExitMode.OFF and item.grammar is None
        if plain and not last.stats.preemptions:
            assert last.stats.layers_executed == LAYERS * len(tokens)


EngineMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestEngineMachine = EngineMachine.TestCase


@pytest.fixture(autouse=True)
def guesses_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sequences run, without having been seen to gain."""
    monkeypatch.setattr(draft_trials, "_MANY", {False: 1000, True: 1000})


def test_the_draft_head_is_asked_and_often_right() -> None:
    """So that the machine above has drafts to lose."""
    engine, runner = fake_engine(num_blocks=40, drafts=True)
    for index in range(8):
        engine.add(request(str(index), [index % 2] * 9, 14, ExitMode.LOSSLESS), time.monotonic())
    events = [event for _ in range(200) if engine.has_work for event in engine.step().events]
    ended = [event.stats for event in events if event.finish_reason]
    assert len(ended) == 8
    assert runner.guesses > 50
    assert sum(stats.accepted for stats in ended) > 20
    assert sum(stats.rejected for stats in ended) > 5
