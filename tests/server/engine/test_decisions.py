"""Decisions in the engine, over a runner that knows what every place of the cache must hold."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.models.costs import CostModel
from offramp.models.sampling_params import NEVER, ExitMode
from offramp.models.step import Pooling
from offramp.server.engine.admission import Admission
from offramp.server.engine.blocks import BlockPool, SequenceMemory, block_hashes
from offramp.server.engine.build import hidden_rows
from offramp.server.engine.decisions import Decisions, top_probability
from offramp.server.engine.engine import Engine
from offramp.server.engine.governor import ExitGovernor
from offramp.server.engine.guard import LiveGuard
from offramp.server.engine.host_decoder import HostDecoder
from offramp.server.engine.kv_debt import DebtLedger, RowPool
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import (
    AnswerRequest,
    AnswerResult,
    DecisionRequest,
    EngineInfo,
    FinishReason,
    StepStats,
    TokenEvent,
)
from offramp.server.engine.thresholds import ExitThresholds

from .fake_decider import DecidingRunner, contents_of, embedding_of, logits_of
from .fake_runner import Cell, expected_answer
from .test_engine_machine import BLOCK, CONTEXT, LAYERS, request

CUTS = (2, 5, 9)
EXITS = (5, 8)
TASK = "task"


def deciding_engine(
    *,
    num_blocks: int = 14,
    max_batched: int = 12,
    caching: bool = True,
    cuts: tuple[int, ...] = CUTS,
    fail_at: frozenset[int] = frozenset(),
) -> tuple[Engine, DecidingRunner]:
    info = EngineInfo(
        "fake",
        LAYERS,
        EXITS,
        (0.5,) * len(EXITS),
        50,
        CONTEXT,
        BLOCK,
        num_blocks,
        4,
        "none",
        max_batched,
        3,
        decision_layers=cuts,
    )
    rows = RowPool(hidden_rows(info))
    memory = SequenceMemory(
        BlockPool(num_blocks, BLOCK), rows, DebtLedger(rows, 3), prefix_caching=caching
    )
    thresholds = ExitThresholds(info.exit_thresholds)
    admission = Admission(info, memory)
    runner = DecidingRunner(EXITS, cuts, LAYERS, BLOCK, fail_at=fail_at)
    governor = ExitGovernor(CostModel.of(3), thresholds, 0.0)
    decoders = [HostDecoder(info, admission, memory, governor, runner)]
    guard = LiveGuard(thresholds, 0.0)
    decisions = Decisions(info, memory, runner)
    engine = Engine(info, admission, memory, decoders, decisions, guard, check_invariants=True)
    return engine, runner


def expected(read: AnswerRequest, cuts: Sequence[int] = CUTS) -> AnswerResult:
    """The only right answer to a read."""
    if read.pooling is not None:
        return AnswerResult(embedding_of(contents_of(read.tokens), read.pooling), LAYERS)
    content = contents_of(read.tokens)[-1]
    for layer, bound in zip(cuts, read.thresholds, strict=False):
        logits = logits_of(content, layer, read.candidates, read.task)
        odds = [math.exp(own) for own in logits]
        if bound <= 1 and max(odds) / math.fsum(odds) >= bound:
            return AnswerResult(logits, layer)
    task = read.task if read.labelled else None
    return AnswerResult(logits_of(content, LAYERS, read.candidates, task), LAYERS)


@dataclass
class Log:
    """What came out of an engine; every event of a request ends it."""

    engine: Engine
    runner: DecidingRunner
    events: dict[str, TokenEvent] = field(default_factory=dict)
    stats: list[StepStats] = field(default_factory=list)

    def ask(self, name: str, *reads: AnswerRequest) -> None:
        self.engine.add(DecisionRequest(name, reads), time.monotonic())

    def step(self) -> None:
        output = self.engine.step()
        assert self.runner.faults == []
        if output.stats is not None:
            self.stats.append(output.stats)
        for event in output.events:
            assert event.request_id not in self.events
            assert event.finish_reason is not None
            self.events[event.request_id] = event

    def finish(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work
        assert self.engine.memory.blocks.num_used == 0

    def run(self, name: str, *reads: AnswerRequest) -> TokenEvent:
        self.ask(name, *reads)
        self.finish()
        event = self.events[name]
        assert event.finish_reason is FinishReason.STOP
        return event


def log_of(
    *,
    num_blocks: int = 14,
    max_batched: int = 12,
    caching: bool = True,
    fail_at: frozenset[int] = frozenset(),
) -> tuple[Log, DecidingRunner]:
    engine, runner = deciding_engine(
        num_blocks=num_blocks, max_batched=max_batched, caching=caching, fail_at=fail_at
    )
    return Log(engine, runner), runner


def read(
    tokens: Sequence[int],
    thresholds: tuple[float, ...] = (),
    *,
    candidates: tuple[int, ...] = (1, 2),
    labelled: bool = False,
) -> AnswerRequest:
    """A read by the LM head, with ``thresholds`` by a task's heads below the top."""
    task = TASK if thresholds or labelled else None
    return AnswerRequest(tuple(tokens), candidates, task, labelled, thresholds)


def embedding(tokens: Sequence[int], pooling: Pooling = Pooling.MEAN) -> AnswerRequest:
    return AnswerRequest(tuple(tokens), (), pooling=pooling)


AT_ONCE = (0.0, NEVER, NEVER)


@st.composite
def reads_of(draw: st.DrawFn) -> tuple[AnswerRequest, ...]:
    """Reads whose prompts begin alike, as those of one request do."""
    shared = draw(st.lists(st.integers(0, 1), max_size=20))
    bounds = st.one_of(
        st.just(()), st.tuples(*[st.sampled_from([0.0, 0.5, 0.6, 0.9, 1.0, NEVER])] * len(CUTS))
    )
    found = []
    for _ in range(draw(st.integers(1, 5))):
        own = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
        if draw(st.integers(0, 3)) == 0:
            found.append(embedding([*shared, *own], draw(st.sampled_from(Pooling))))
            continue
        candidates = tuple(draw(st.sampled_from([(1, 2), (3, 4, 5), (2, 1)])))
        labelled = draw(st.booleans())
        found.append(read([*shared, *own], draw(bounds), candidates=candidates, labelled=labelled))
    return tuple(found)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    requests=st.lists(reads_of(), min_size=1, max_size=8),
    num_blocks=st.integers(10, 24),
    max_batched=st.integers(2, 30),
    caching=st.booleans(),
    seed=st.integers(0, 10**6),
    abort_share=st.sampled_from([0.0, 0.0, 0.3]),
    fail_share=st.sampled_from([0.0, 0.0, 0.1]),
)
def test_every_request_gets_its_one_right_answer(
    requests: list[tuple[AnswerRequest, ...]],
    num_blocks: int,
    max_batched: int,
    caching: bool,  # noqa: FBT001 (drawn by hypothesis)
    seed: int,
    abort_share: float,
    fail_share: float,
) -> None:
    """In whatever order they come, are aborted, or are failed by the runner."""
    chance = Random(seed)
    fail_at = frozenset(step for step in range(200) if chance.random() < fail_share)
    log, runner = log_of(
        num_blocks=num_blocks, max_batched=max_batched, caching=caching, fail_at=fail_at
    )
    names = [f"{index}" for index in range(len(requests))]
    chance.shuffle(names)
    waiting, aborted = list(names), set()
    while waiting:
        name = waiting.pop()
        log.ask(name, *requests[int(name)])
        for _ in range(chance.randrange(4)):
            log.step()
        if chance.random() < abort_share:
            aborted.add(victim := chance.choice(names))
            log.engine.abort(victim)
    log.finish()
    assert log.events.keys() == set(names)
    failed = 0
    for name, event in log.events.items():
        if event.finish_reason is FinishReason.STOP:
            assert list(event.answers) == [expected(each) for each in requests[int(name)]]
        elif event.finish_reason is FinishReason.ABORT:
            assert name in aborted
        else:
            assert event.finish_reason is FinishReason.ERROR
            failed += 1
    assert bool(failed) <= bool(fail_at & set(range(len(runner.steps))))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    requests=st.lists(reads_of(), min_size=1, max_size=6),
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24), min_size=1, max_size=6),
    num_blocks=st.integers(10, 24),
    modes=st.lists(st.sampled_from([ExitMode.OFF, ExitMode.ADAPTIVE]), min_size=6, max_size=6),
    seed=st.integers(0, 10**6),
)
def test_chats_and_decisions_share_the_cache(
    requests: list[tuple[AnswerRequest, ...]],
    prompts: list[list[int]],
    num_blocks: int,
    modes: list[ExitMode],
    seed: int,
) -> None:
    engine, runner = deciding_engine(num_blocks=num_blocks)
    chance = Random(seed)
    work: list[tuple[str, int]] = [("ask", i) for i in range(len(requests))]
    work += [("chat", i) for i in range(len(prompts))]
    chance.shuffle(work)
    events: dict[str, list[TokenEvent]] = {f"{kind} {index}": [] for kind, index in work}
    ended = 0
    for _ in range(6000):
        if work and (chance.random() < 0.4 or not engine.has_work):
            kind, index = work.pop()
            if kind == "ask":
                made = DecisionRequest(f"ask {index}", requests[index])
                engine.add(made, time.monotonic())
            else:
                chat = request(f"chat {index}", prompts[index], 8, modes[index])
                engine.add(chat, time.monotonic())
        for event in engine.step().events:
            events[event.request_id].append(event)
            ended += event.finish_reason is not None
        if ended == len(events):
            break
    assert runner.faults == []
    assert ended == len(events)
    assert engine.memory.blocks.num_used == 0
    for name, own in events.items():
        kind, number = name.split()
        ends = [event.finish_reason is not None for event in own]
        assert ends == [*[False] * (len(own) - 1), True]
        if kind == "ask":
            assert len(own) == 1
            assert list(own[0].answers) == [expected(each) for each in requests[int(number)]]
        else:
            tokens = [token for event in own for token in event.token_ids]
            assert tokens == expected_answer(prompts[int(number)], 8)


def test_the_numbers_of_a_request_and_of_the_next() -> None:
    """Blocks of four: what is shared runs once, and only as far as the answers need it."""
    log, runner = log_of(num_blocks=20, max_batched=64)
    shared = [0] * 8
    first = log.run(
        "first", read([*shared, 1, 2], AT_ONCE), read([*shared, 2], AT_ONCE), read([*shared, 3, 3])
    )
    assert [answer.layer for answer in first.answers] == [2, 2, LAYERS]
    assert first.stats.prompt_tokens == 8 + 2 + 1 + 2
    assert first.stats.cached_tokens == 0
    assert first.stats.layers_executed == 2 * 13 + (LAYERS - 2) * (8 + 2)
    assert [step.segment for step in runner.steps] == [0, 1, 2, 3]
    second = log.run("second", read([*shared, 4], AT_ONCE))
    assert second.stats.cached_tokens == 8
    assert second.stats.prompt_tokens == 9
    assert second.stats.layers_executed == 2
    assert sum(stats.layers_executed for stats in log.stats) == 2 * 14 + (LAYERS - 2) * 10
    assert sum(stats.prefix_hits for stats in log.stats) == 8


def test_embeddings_share_what_they_begin_with() -> None:
    """Within a request, and with what earlier requests left, as far as that has come."""
    log, _ = log_of(num_blocks=20, max_batched=64)
    text = list(range(10))
    log.run("shallow", read([*text, 1], AT_ONCE))
    reads = [embedding([*text, 1]), embedding([*text, 2, 2]), embedding(text, Pooling.LAST)]
    event = log.run("embed", *reads)
    assert event.answers == tuple(map(expected, reads))
    assert event.stats.cached_tokens == 8
    # The two blocks have been through two layers; the ninth token is shared and the rest is not.
    assert event.stats.layers_executed == (LAYERS - 2) * 8 + LAYERS * (1 + 2 + 3 + 1)
    again = log.run("again", embedding([*text, 3]))
    assert again.answers == (expected(embedding([*text, 3])),)
    assert again.stats.layers_executed == LAYERS * 3


def test_when_all_have_left_nothing_runs_above() -> None:
    log, runner = log_of(num_blocks=20, max_batched=64)
    event = log.run("a", read([*range(8), 1], AT_ONCE), read([*range(8), 2], AT_ONCE))
    assert event.stats.layers_executed == 2 * 10
    assert [step.segment for step in runner.steps] == [0]


def test_a_later_request_takes_shallow_blocks_on() -> None:
    """Further up than the first one did, from where that one stopped."""
    log, runner = log_of(num_blocks=20, max_batched=64)
    text = list(range(8))
    log.run("shallow", read([*text, 1], AT_ONCE))
    deep = log.run("deep", read([*text, 2]))
    assert deep.stats.cached_tokens == 8
    assert deep.stats.layers_executed == 2 * 1 + (LAYERS - 2) * 9
    again = log.run("again", read([*text, 3]))
    assert again.stats.layers_executed == LAYERS
    assert [step.segment for step in runner.steps] == [0, 0, 1, 2, 3, 0, 1, 2, 3]


def test_chats_find_only_what_has_been_through_the_whole_stack() -> None:
    log, _ = log_of(num_blocks=20, max_batched=64)
    text = list(range(8))
    digests = block_hashes(text, BLOCK)
    blocks = log.engine.memory.blocks
    log.run("shallow", read([*text, 1], AT_ONCE))
    assert blocks.share(digests) == []
    first = run_all(log.engine, [request("chat", [*text, 9], 1)], concurrency=1)
    assert first[0].stats is not None
    assert first[0].stats.cached_tokens == 0

    log, _ = log_of(num_blocks=20, max_batched=64)
    blocks = log.engine.memory.blocks
    log.run("shallow", read([*text, 1], AT_ONCE))
    log.run("deep", read([*text, 2]))
    found = run_all(log.engine, [request("chat", [*text, 9], 3)], concurrency=1)
    assert found[0].stats is not None
    assert found[0].stats.cached_tokens == 8
    assert found[0].token_ids == expected_answer([*text, 9], 3)


def test_questions_at_full_depth_find_what_chats_left() -> None:
    """Heads and embeddings do not: they read means of states, which chats do not keep."""
    text = list(range(8))
    for own, cached in (
        (read([*text, 1]), 8),
        (read([*text, 1], AT_ONCE), 0),
        (embedding([*text, 1]), 0),
    ):
        log, _ = log_of(num_blocks=20)
        run_all(log.engine, [request("chat", [*text, 9], 1)], concurrency=1)
        event = log.run("ask", own)
        assert event.stats.cached_tokens == cached
        assert event.answers == (expected(own),)


def chat_writes(log: Log, text: Sequence[int], block: int) -> None:
    """Let a chat have left one block of text in just this block."""
    pool = log.engine.memory.blocks
    (digest,) = block_hashes(text, BLOCK)
    others = pool.allocate(pool.num_blocks - 1, -1)
    assert others is not None
    assert pool.allocate(1, -1) == [block]
    for offset, content in enumerate(contents_of(text)):
        for layer in range(LAYERS):
            log.runner.kv.layers[layer, block * BLOCK + offset] = Cell(content, exact=True)
    pool.register(block, digest)
    pool.release([block])
    pool.release(others)


def test_what_chats_wrote_over_is_not_taken_for_what_decisions_left() -> None:
    """A block holds a text of decisions, another of chats, then the first again, by a chat."""
    log, _ = log_of(num_blocks=10, max_batched=64)
    first, other = [0] * 4, [1] * 4
    log.run("first", read([*first, 2], AT_ONCE))
    (block,) = log.engine.memory.blocks._hash_of
    chat_writes(log, other, block)
    assert log.run("other", read([*other, 2])).stats.cached_tokens == 4
    chat_writes(log, first, block)
    deep = read([*first, 3], (NEVER, 0.0, NEVER))
    assert log.run("again", deep).answers == (expected(deep),)


def test_without_prefix_caching_nothing_is_found() -> None:
    log, runner = log_of(caching=False, max_batched=64)
    text = list(range(8))
    for name in ("a", "b"):
        event = log.run(name, read([*text, 1]), read([*text, 2]))
        assert event.stats.cached_tokens == 0
        assert event.stats.layers_executed == LAYERS * 10
    assert len(runner.steps) == 8
    assert not log.engine.memory.blocks._hash_of
    assert sum(stats.prefix_queries for stats in log.stats) == 0


def test_reads_that_never_fit_at_once_are_answered_in_waves() -> None:
    log, runner = log_of(num_blocks=12, max_batched=64)
    reads = [read([*[0] * 8, number, *[1] * 5], AT_ONCE) for number in range(20)]
    event = log.run("many", *reads)
    assert list(event.answers) == [expected(each) for each in reads]
    assert len(runner.steps) > 2
    # What they share is run in the first wave only.
    assert event.stats.layers_executed == 2 * (8 + 20 * 6)
    assert event.stats.prompt_tokens == 8 + 20 * 6


def test_many_questions_leave_blocks_for_others() -> None:
    log, _ = log_of(num_blocks=16, max_batched=64)
    reads = [read([*[0] * 8, number, *[1] * 5]) for number in range(20)]
    assert list(log.run("many", *reads).answers) == [expected(each) for each in reads]
    assert max(stats.kv_used_blocks for stats in log.stats) == 12


def test_requests_that_wait_for_each_others_blocks_all_end() -> None:
    """Each holds what its reads share and needs more than is left for the next of them."""
    log, _ = log_of(num_blocks=10, max_batched=64)
    reads = {}
    for name, letter in (("a", 0), ("b", 1)):
        shared = [letter] * 8
        reads[name] = [read([*shared, 2]), read([*shared, *[3] * 32])]
        log.ask(name, *reads[name])
    log.finish()
    for name, own in reads.items():
        assert list(log.events[name].answers) == [expected(each) for each in own]
        stats = log.events[name].stats
        assert (stats.prompt_tokens, stats.cached_tokens) == (8 + 1 + 32, 0)


def test_a_long_prompt_runs_in_parts() -> None:
    log, runner = log_of(max_batched=8)
    own = read([*range(30)])
    assert log.run("long", own).answers == (expected(own),)
    assert max(sum(len(item.positions) for item in step.work) for step in runner.steps) <= 8
    assert [step.segment for step in runner.steps] == [s for s in range(4) for _ in range(4)]


def test_a_long_prompt_lets_short_ones_go_first() -> None:
    log, runner = log_of(num_blocks=24, max_batched=8)
    log.ask("long", read([*range(40)]))
    log.step()
    log.ask("short", read([7, 1, 2]))
    log.finish()
    assert list(log.events) == ["short", "long"]
    # Two steps of the long one for each of the short one's, at most.
    ended = next(index for index, step in enumerate(runner.steps) if step.reads)
    assert ended <= 1 + 2 * (len(CUTS) + 1)


def test_requests_at_one_height_run_together() -> None:
    log, runner = log_of(num_blocks=24, max_batched=64)
    for name in "abc":
        log.ask(name, read([ord(name), 1, 2]))
    log.finish()
    assert [len(step.work) for step in runner.steps] == [3] * 4


@pytest.mark.parametrize(
    "reads",
    [
        (),
        (read([]),),
        (read([1], candidates=()),),
        (read([1] * (CONTEXT + 1)),),
        (embedding([]),),
    ],
    ids=["none", "empty", "no answers", "too long", "nothing to embed"],
)
def test_what_cannot_be_asked_ends_at_once(reads: tuple[AnswerRequest, ...]) -> None:
    log, runner = log_of()
    log.ask("bad", *reads)
    log.ask("good", read([1, 2]))
    log.finish()
    assert log.events["bad"].finish_reason is FinishReason.ERROR
    assert log.events["bad"].error
    assert log.events["good"].answers == (expected(read([1, 2])),)
    assert runner.steps


def test_a_prompt_may_fill_the_context() -> None:
    log, _ = log_of(num_blocks=10)
    own = read([1] * CONTEXT)
    assert log.run("long", own).answers == (expected(own),)


def test_a_failing_step_ends_its_requests_only() -> None:
    """What it left half done is not found by later ones."""
    log, _ = log_of(num_blocks=24, max_batched=64, fail_at=frozenset({2}))
    text = list(range(8))
    log.run("before", read([*text, 1], AT_ONCE))
    log.ask("a", read([*text, 1]))
    log.step()
    log.ask("b", read([7, 7, 7]))
    log.step()
    log.finish()
    assert log.events["a"].finish_reason is FinishReason.ERROR
    assert log.events["a"].error
    assert log.events["b"].answers == (expected(read([7, 7, 7])),)
    again = log.run("again", read([*text, 1]), read([*text, 2], (NEVER, 0.0, NEVER)))
    assert again.answers[0] == expected(read([*text, 1]))


def test_a_failing_step_also_ends_those_that_share_its_blocks() -> None:
    """Their blocks may have gone half way through a segment."""
    log, runner = log_of(num_blocks=24, max_batched=64, fail_at=frozenset({3}))
    text = list(range(8))
    log.run("before", read([*text, 1], AT_ONCE))
    log.ask("a", read([*text, 1]))
    log.step()
    log.step()
    log.ask("b", read([*text, 2]))
    assert len(runner.steps) == 3
    log.finish()
    assert log.events["a"].finish_reason is FinishReason.ERROR
    event = log.events["b"]
    right = event.answers == (expected(read([*text, 2])),)
    assert right or event.finish_reason is FinishReason.ERROR
    own = read([*text, 3])
    assert log.run("c", own).answers == (expected(own),)


def test_aborted_requests_end_once_and_free_their_blocks() -> None:
    log, _ = log_of(num_blocks=24, max_batched=8)
    for name in "abc":
        log.ask(name, read([ord(name), *range(20)]))
    log.step()
    log.engine.abort("a")
    log.engine.abort("c")
    log.engine.abort("a")
    log.engine.abort("nobody")
    log.finish()
    reasons = {name: event.finish_reason for name, event in log.events.items()}
    assert reasons == {"a": FinishReason.ABORT, "b": FinishReason.STOP, "c": FinishReason.ABORT}


def test_blocks_that_ran_nowhere_are_not_cached() -> None:
    """A request may be aborted before all it shares has been run."""
    log, _ = log_of(num_blocks=24, max_batched=8)
    text = list(range(20))
    log.ask("a", read([*text, 1]))
    log.step()
    log.engine.abort("a")
    log.finish()
    event = log.run("b", read([*text, 1]))
    assert event.stats.cached_tokens == 8
    assert event.answers == (expected(read([*text, 1])),)


def test_decisions_do_not_keep_chats_waiting() -> None:
    """Steps are taken in turns."""
    engine, _ = deciding_engine(num_blocks=30, max_batched=4)
    engine.add(DecisionRequest("ask", (read([*range(38)]),)), time.monotonic())
    engine.add(request("chat", [1, 2], 4), time.monotonic())
    order: list[str] = []
    while engine.has_work:
        order += [event.request_id for event in engine.step().events]
    assert order == [*["chat"] * 4, "ask"]


def test_steps_are_counted_as_decisions() -> None:
    log, _ = log_of(num_blocks=20, max_batched=64)
    log.run("a", read([1, 2, 3]))
    assert [stats.kind for stats in log.stats] == ["decisions"] * 4
    assert [stats.segment for stats in log.stats] == [0, 1, 2, 3]
    assert [stats.prefill_rows for stats in log.stats] == [3] * 4
    assert log.stats[0].running == 1
    assert log.stats[0].kv_used_blocks == 1
    assert log.stats[-1].running == 0


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=5))
def test_top_probability(logits: list[float]) -> None:
    odds = [math.exp(each - max(logits)) for each in logits]
    assert top_probability(logits) == pytest.approx(1 / math.fsum(odds))
