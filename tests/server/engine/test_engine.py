"""Single behaviours of the engine over the fake runner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from offramp.models.sampling_params import ExitMode, KVFill, TokenSource
from offramp.models.step import Draft, Step, StepResult
from offramp.server.engine import admission, draft_trials
from offramp.server.engine import sequence as sequences
from offramp.server.engine.engine import Engine
from offramp.server.engine.governor import HeadPlan
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import EngineOutput, FinishReason, GenerationRequest, StepStats

from .fake_runner import FakeRunner, expected_answer
from .test_engine_machine import BLOCK, CONTEXT, LAYERS, fake_engine, host_of, request


def run(
    engine: Engine, requests: Sequence[GenerationRequest], concurrency: int = 8
) -> tuple[list[Finished], list[StepStats]]:
    """All answers and the statistics of all steps."""
    stats: list[StepStats] = []

    def observe(output: EngineOutput) -> None:
        if output.stats is not None:
            stats.append(output.stats)

    return run_all(engine, requests, concurrency=concurrency, observe=observe), stats


def test_a_second_prompt_reuses_the_blocks_of_the_first() -> None:
    """Full blocks of an equal beginning are found, but the last token is always computed."""
    engine, _ = fake_engine()
    prompt = list(range(12))
    first, _ = run(engine, [request("a", prompt, 2)])
    second, _ = run(engine, [request("b", prompt, 2)])
    assert first[0].stats is not None
    assert second[0].stats is not None
    assert (first[0].stats.cached_tokens, second[0].stats.cached_tokens) == (0, 11)
    assert second[0].token_ids == first[0].token_ids == expected_answer(prompt, 2)


def test_the_last_token_of_an_answer_is_not_written_into_a_shared_block() -> None:
    """It may leave early, and the block of full-depth K,V is another request's too."""
    engine, _ = fake_engine(num_blocks=40)
    text = [1, 2, *expected_answer([1, 2], 10)]
    run(engine, [request("a", text, 2)])
    sequence = sequences.Sequence(99, request("b", [1, 2], 20, ExitMode.ADAPTIVE), 0.0, 3)
    sequence.tokens = text
    assert engine.memory.admit(sequence)
    assert sequence.computed == [8, 8, 8]
    assert sequence.table[-1] not in engine.memory.blocks._hash_of


def test_other_salts_share_no_blocks() -> None:
    engine, _ = fake_engine(num_blocks=40)
    prompt = list(range(12))
    cached = []
    for name, salt in (("a", ""), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "")):
        done, _ = run(engine, [replace(request(name, prompt, 6), cache_salt=salt)])
        assert done[0].stats is not None
        assert done[0].token_ids == expected_answer(prompt, 6)
        cached.append(done[0].stats.cached_tokens)
    assert cached == [0, 0, 0, 11, 11]


def test_a_long_prompt_leaves_answers_their_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside answers its chunks are small, without them as large as a step."""
    monkeypatch.setattr(admission, "_FEWEST_PROMPT_ROWS", 5)
    monkeypatch.setattr(admission, "_PROMPT_ROWS_BESIDE", 2)
    engine, _ = fake_engine(exit_layers=(), num_blocks=60, max_num_seqs=8, max_batched=32)
    for name in "abcd":
        engine.add(request(name, [ord(name)], 8), time.monotonic())
    engine.step()
    engine.add(request("long", list(range(36)), 1), time.monotonic())
    chunks = []
    while engine.has_work:
        stats = engine.step().stats
        if stats is not None and stats.prefill_rows:
            chunks.append((stats.prefill_rows, stats.decode_rows))
    assert chunks == [(8, 4)] * 4 + [(4, 4)]
    done, steps = run(engine, [request("one", [1], 9), request("other", list(range(1, 37)), 1)], 2)
    assert done[1].token_ids == expected_answer(range(1, 37), 1)
    # Both prompts at once, then five rows beside the one answer.
    assert [each.prefill_rows for each in steps if each.prefill_rows] == [32, 5]


def test_the_lowest_priority_runs_first() -> None:
    engine, _ = fake_engine(max_num_seqs=1)
    wanted = {"a": 0, "b": 5, "c": -3, "d": 0, "e": -3}
    for name, priority in wanted.items():
        engine.add(replace(request(name, [1, 2, 3], 3), priority=priority), time.monotonic())
    ended = [
        event.request_id
        for _ in range(60)
        if engine.has_work
        for event in engine.step().events
        if event.finish_reason
    ]
    assert ended == ["c", "e", "a", "d", "b"]


def test_whoever_waits_for_a_minute_goes_first() -> None:
    engine, _ = fake_engine(max_num_seqs=1)
    now = time.monotonic()
    engine.add(replace(request("old", [1, 2, 3], 3), priority=9), now - 61)
    engine.add(replace(request("older than it seems", [1, 2], 3), priority=9), now - 59)
    ended: list[str] = []
    for number in range(20):
        # More urgent ones never cease to come.
        engine.add(replace(request(f"{number}", [1, 2, 3], 3), priority=-1), now)
        while len(ended) == number:
            ended += [event.request_id for event in engine.step().events if event.finish_reason]
    assert ended[0] == "old"
    assert "older than it seems" not in ended


def test_one_that_waited_for_long_keeps_its_blocks() -> None:
    engine, _ = fake_engine(num_blocks=11, max_num_seqs=3)
    for name, priority, waited in (("b", 2, 61), ("a", 1, 0), ("c", 0, 0)):
        sooner = replace(request(name, [ord(name)] * 9, 20), priority=priority)
        engine.add(sooner, time.monotonic() - waited)
    events = [event for _ in range(300) if engine.has_work for event in engine.step().events]
    lost = {event.request_id: event.stats.preemptions for event in events if event.finish_reason}
    assert lost["b"] == 0
    assert lost["a"] > 0


def test_the_least_urgent_gives_up_its_blocks() -> None:
    engine, _ = fake_engine(num_blocks=11, max_num_seqs=3)
    for name, priority in (("a", 1), ("b", 2), ("c", 0)):
        sooner = replace(request(name, [ord(name)] * 9, 20), priority=priority)
        engine.add(sooner, time.monotonic())
    events = [event for _ in range(300) if engine.has_work for event in engine.step().events]
    lost = {event.request_id: event.stats.preemptions for event in events if event.finish_reason}
    assert lost["c"] == 0
    assert lost["b"] > 0
    assert lost["b"] >= lost["a"]


@pytest.mark.parametrize("fill", [KVFill.PROJECT, KVFill.COPY])
def test_approximate_kv_is_never_shared(fill: KVFill) -> None:
    """Blocks with projected or copied K,V stay private: mode off must not read them."""
    engine, _ = fake_engine(leave_share=0.7, num_blocks=40, every_exit=True)
    prompt = [1, 2, 3]
    adaptive, _ = run(engine, [request("a", prompt, 30, ExitMode.ADAPTIVE, fill)])
    assert set(adaptive[0].exit_layers) > {LAYERS}
    longer = [*prompt, *adaptive[0].token_ids, 0]
    exact, _ = run(engine, [request("b", longer, 4)])
    assert exact[0].stats is not None
    assert exact[0].stats.cached_tokens < len(longer) - BLOCK


def test_recomputed_debts_are_counted_as_fills() -> None:
    """Every token that left has its K,V made by a later pass, but those after the last one."""
    engine, _ = fake_engine(leave_share=0.5, num_blocks=40, every_exit=True)
    done, stats = run(engine, [request("a", [1, 2, 3], 24, ExitMode.ADAPTIVE, KVFill.RECOMPUTE)])
    layers = done[0].exit_layers
    last_deep = max(i for i, layer in enumerate(layers) if layer == LAYERS)
    left = sum(layer < LAYERS for layer in layers[:last_deep])
    assert left > 0
    assert sum(item.fill_tokens for item in stats) == left
    assert {item.fill_method for item in stats if item.fill_tokens} == {"recompute"}


def test_recomputed_kv_is_shared() -> None:
    """Debts paid by recompute leave the K,V full depth would give."""
    engine, _ = fake_engine(leave_share=0.5, num_blocks=40, every_exit=True)
    prompt = [1, 2, 3]
    done, _ = run(engine, [request("a", prompt, 30, ExitMode.ADAPTIVE, KVFill.RECOMPUTE)])
    assert min(done[0].exit_layers) < LAYERS
    again, _ = run(engine, [request("b", [*prompt, *done[0].token_ids], 1)])
    assert again[0].stats is not None
    assert again[0].stats.cached_tokens >= 20


def test_layers_are_counted_where_they_ran() -> None:
    """With every gate open each token but the prompt's runs only the first segment."""
    engine, _ = fake_engine(leave_share=1.0, max_debt=100, every_exit=True)
    done, stats = run(engine, [request("a", [1, 2], 10, ExitMode.ADAPTIVE)])
    assert done[0].exit_layers == [LAYERS] + [5] * 9
    assert done[0].stats is not None
    assert done[0].stats.layers_executed == LAYERS + 9 * 5
    assert sum(item.layers_executed for item in stats) == LAYERS + 9 * 5
    assert {item.kind for item in stats} == {"segments"}


def test_recompute_counts_the_layers_it_runs_later() -> None:
    """A recomputed debt is work done, not work saved."""
    engine, _ = fake_engine(leave_share=1.0, max_debt=3, every_exit=True)
    done, _ = run(engine, [request("a", [1, 2], 9, ExitMode.ADAPTIVE, KVFill.RECOMPUTE)])
    owed_at_the_end = [layer for layer in done[0].exit_layers if layer < LAYERS]
    assert done[0].stats is not None
    assert owed_at_the_end
    assert done[0].stats.layers_executed > LAYERS * 9 - len(owed_at_the_end) * (LAYERS - 5)


def test_projected_debt_is_bounded_by_paying() -> None:
    """At the debt limit a projection pays, so no token has to stay for it."""
    engine, _ = fake_engine(leave_share=1.0, max_debt=2, every_exit=True)
    done, stats = run(engine, [request("a", [1], 12, ExitMode.ADAPTIVE)])
    assert max(item.debt_tokens for item in stats) == 2
    assert done[0].exit_layers == [LAYERS] + [5] * 11
    assert {item.fill_method for item in stats if item.kind == "fill"} == {"project"}


def test_recomputed_debt_is_bounded_by_staying() -> None:
    """At the debt limit a token is not checked: its full pass pays for those before."""
    engine, _ = fake_engine(leave_share=1.0, max_debt=2, every_exit=True)
    done, stats = run(engine, [request("a", [1], 12, ExitMode.ADAPTIVE, KVFill.RECOMPUTE)])
    assert max(item.debt_tokens for item in stats) == 2
    assert done[0].exit_layers == [LAYERS] + [5, 5, LAYERS] * 3 + [5, 5]


def test_tokens_kept_by_the_policy_are_counted() -> None:
    engine, _ = fake_engine(leave_share=1.0, every_exit=True)
    governor = host_of(engine).governor
    governor.exits_pay = lambda *_: False  # type: ignore[method-assign]
    done, stats = run(engine, [request("a", [1], 12, ExitMode.ADAPTIVE)])
    assert done[0].exit_layers == [LAYERS] * 12
    assert done[0].stats is not None
    assert sum(item.stayed for item in stats) == done[0].stats.stayed == 22
    # Each at both exits; the first is not the answer's own but the prompt's.
    assert done[0].sources == [TokenSource.MODEL] + [TokenSource.STAYED] * 11


def test_closed_gates_make_every_token_run_every_layer() -> None:
    """No gate fires: full depth, no debt, no fill."""
    engine, _ = fake_engine(leave_share=0.0)
    done, stats = run(engine, [request("a", [1, 2, 3], 6, ExitMode.ADAPTIVE)])
    assert done[0].exit_layers == [LAYERS] * 6
    assert max(item.debt_tokens for item in stats) == 0


def test_sequences_share_each_upper_step() -> None:
    """Sequences that stay go up together, one segment step for all of them."""
    engine, _ = fake_engine(leave_share=0.0, num_blocks=40, max_batched=40)
    requests = [request(str(i), [i, i], 5) for i in range(4)]
    _, stats = run(engine, requests)
    tops = [item for item in stats if item.kind == "segments" and item.segment == 2]
    assert len(tops) == 5
    assert {item.prefill_rows + item.decode_rows for item in tops[1:]} == {4}


def test_preempted_requests_finish_with_the_same_answer() -> None:
    """When blocks run out the newest sequence waits and is prefilled again."""
    engine, _ = fake_engine(num_blocks=10, caching=False)
    prompts = [[i, 1, 2, 3, 4, 5] for i in range(4)]
    done, stats = run(engine, [request(str(i), p, 14) for i, p in enumerate(prompts)])
    assert sum(item.preemptions for item in stats) > 0
    assert [item.token_ids for item in done] == [expected_answer(p, 14) for p in prompts]


def test_none_is_preempted_while_a_group_is_held_back() -> None:
    """The group runs instead: it ends and frees blocks; who is preempted comes back at once."""
    engine, _ = fake_engine(num_blocks=10, max_hold=1e6, leave_share=1.0, max_debt=4)
    prompts = [[0] * 8, [1] * 9, [1, 0] * 4]
    requests = [
        request("0", prompts[0], 8),
        request("1", prompts[1], 11, ExitMode.LOSSLESS),
        request("2", prompts[2], 11, ExitMode.LOSSLESS),
    ]
    done, stats = run(engine, requests)
    assert [item.token_ids for item in done] == [
        expected_answer(prompt, len(item.token_ids))
        for prompt, item in zip(prompts, done, strict=True)
    ]
    assert sum(item.preemptions for item in stats) <= 2
    assert len(stats) < 60


def test_long_prompts_go_up_in_chunks_beside_decoding() -> None:
    """A chunk never exceeds the token budget, and decoding goes on next to it."""
    engine, _ = fake_engine(num_blocks=40, max_batched=5)
    engine.add(request("a", [1], 30), time.monotonic())
    while not engine.step().events:
        pass
    engine.add(request("b", list(range(20)), 1), time.monotonic())
    mixed = 0
    while engine.has_work:
        stats = engine.step().stats
        assert stats is not None
        assert stats.prefill_rows + stats.decode_rows <= 5
        mixed += stats.prefill_rows > 0 and stats.decode_rows > 0
    assert mixed


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [([], 4), ([1] * CONTEXT, 4), ([1], 0)], ids=["empty", "full", "none"]
)
def test_unservable_requests_end_in_one_error_event(prompt: list[int], max_tokens: int) -> None:
    """The front refuses these; should one slip through it still ends."""
    engine, _ = fake_engine()
    engine.add(request("a", prompt, max_tokens), time.monotonic())
    events = engine.step().events
    assert [event.finish_reason for event in events] == [FinishReason.ERROR]
    assert not engine.has_work


def test_aborting_twice_or_the_unknown_is_harmless() -> None:
    """An abort is one terminal event, whatever comes after it."""
    engine, _ = fake_engine()
    engine.abort("unknown")
    engine.add(request("a", [1, 2], 5), time.monotonic())
    engine.step()
    engine.abort("a")
    engine.abort("a")
    events = engine.step().events
    assert [event.finish_reason for event in events] == [FinishReason.ABORT]
    assert not engine.has_work


def test_a_step_goes_as_far_as_nothing_is_decided() -> None:
    """All segments and the head in mode off; up to the exit where a token may leave else."""
    engine, _ = fake_engine(leave_share=0.0, num_blocks=40, every_exit=True)
    _, off = run(engine, [request("a", [1, 2, 3], 5)])
    assert [(item.first_segment, item.segment) for item in off] == [(0, 2)] * 5
    _, adaptive = run(engine, [request("b", [4, 5, 6], 5, ExitMode.ADAPTIVE)])
    steps = [(item.first_segment, item.segment) for item in adaptive]
    assert steps == [(0, 2), *[(0, 0), (1, 1), (2, 2)] * 4]


def test_a_step_stops_where_others_wait() -> None:
    """Who must go on joins those that are held above, and all go up together."""
    engine, _ = fake_engine(leave_share=0.0, num_blocks=40, every_exit=True)
    governor = host_of(engine).governor
    held = [True]
    governor.holds = lambda *_: held[0]  # type: ignore[method-assign]
    done, stats = run(
        engine,
        [request("a", [1, 2], 4, ExitMode.ADAPTIVE), request("b", [3, 4, 5], 6)],
        concurrency=2,
    )
    assert [item.token_ids for item in done] == [
        expected_answer([1, 2], 4),
        expected_answer([3, 4, 5], 6),
    ]
    joined = [item for item in stats if item.first_segment == 1]
    assert joined
    assert {item.decode_rows for item in joined} == {2}


def test_a_step_that_fails_ends_its_requests_and_not_the_engine() -> None:
    engine, runner = fake_engine()
    run_step, faults = runner.run, iter([False, True])

    def faulty(step: Step) -> StepResult:
        if next(faults, False):
            raise IndexError("planted")
        return run_step(step)

    runner.run = faulty  # type: ignore[method-assign]
    failed, _ = run(engine, [request("a", [1, 2, 3], 9), request("b", [4, 5], 9)])
    assert [each.reason for each in failed] == [FinishReason.ERROR] * 2
    engine.check()
    done, _ = run(engine, [request("c", [1, 2, 3], 4)])
    assert done[0].token_ids == expected_answer([1, 2, 3], 4)


def test_an_engine_that_only_fails_gives_up() -> None:
    engine, runner = fake_engine()

    def broken(_: Step) -> StepResult:
        raise IndexError("planted")

    runner.run = broken  # type: ignore[assignment, method-assign]
    for index in range(3):
        run(engine, [request(str(index), [1, 2], 2)])
    with pytest.raises(IndexError):
        run(engine, [request("last", [1, 2], 2)])


def test_gauges_fall_when_the_last_request_is_aborted() -> None:
    engine, _ = fake_engine()
    engine.add(request("a", [1, 2, 3], 50), time.monotonic())
    stats = [engine.step().stats for _ in range(3)]
    assert stats[-1] is not None
    assert (stats[-1].running, stats[-1].kv_used_blocks > 0) == (1, True)
    engine.abort("a")
    last = engine.step().stats
    assert last is not None
    assert (last.kind, last.running, last.kv_used_blocks) == ("idle", 0, 0)
    assert not engine.has_work


def test_who_asks_for_it_leaves_whatever_it_costs() -> None:
    """In one batch with a request that leaves only where that pays, which it never does."""
    engine, _ = fake_engine(leave_share=0.7, num_blocks=40)
    governor = host_of(engine).governor
    governor.checks_pay = lambda *_: False  # type: ignore[method-assign]
    governor.exits_pay = lambda *_: False  # type: ignore[method-assign]
    plain = request("a", [1, 2, 3], 12, ExitMode.ADAPTIVE)
    always = replace(plain, request_id="b", exits=replace(plain.exits, always=True))
    stays, leaves = run(engine, [plain, always])[0]
    assert set(stays.exit_layers) == {LAYERS}
    assert min(leaves.exit_layers) < LAYERS
    assert len(leaves.token_ids) == len(stays.token_ids) == 12


class Clock:
    """A millisecond for each look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


class Drafted(FakeRunner):
    """Notes the entries of the draft head's calls, and the guesses that each asked for.

    A call takes a second of ``clock``.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(3, BLOCK, leave_share=0.0, seed=0)
        self.calls: list[tuple[int, int]] = []
        self._clock = clock

    def run(self, step: Step) -> StepResult:
        if isinstance(step, Draft):
            self._clock.now += 1
            entries = sum(len(item.rows) for item in step.work)
            self.calls.append((entries, sum(item.guesses for item in step.work)))
        return super().run(step)


def test_the_draft_head_runs_only_where_guesses_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ninth run of four steps; entries begin anew behind those without."""
    monkeypatch.setattr(draft_trials, "_MANY", {False: 0, True: 0})
    monkeypatch.setattr(draft_trials, "_RUN", 4)
    monkeypatch.setattr(draft_trials, "_SKIPPED", 1)
    monkeypatch.setattr(draft_trials._Trial, "_every", lambda _: 9)
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    runner = Drafted(clock)
    engine, _ = fake_engine(num_blocks=40, drafts=True, runner=runner)
    plan = HeadPlan(3, 0.0, (-1.0,) * 3)
    host_of(engine).governor.head_plan = lambda rows, luck=1.0: plan  # type: ignore[method-assign]
    requests = [request(str(i), [1, 2, i], CONTEXT - 3, ExitMode.LOSSLESS) for i in range(8)]
    for each in requests:
        done, _ = run(engine, [each], concurrency=1)
        assert done[0].token_ids == expected_answer(each.prompt, CONTEXT - 3)
    tokens = len(requests) * (CONTEXT - 3)
    guesses = sum(asked > 0 for _, asked in runner.calls)
    assert 0.05 < guesses / tokens < 0.2
    # Those of the run before it and its own, and of the block in which they begin.
    made = sum(entries for entries, _ in runner.calls)
    assert made < 0.4 * tokens


@pytest.mark.parametrize("save", [False, True])
def test_adaptive_requests_are_guessed_for_where_exits_gain_nothing(
    monkeypatch: pytest.MonkeyPatch, *, save: bool
) -> None:
    """Not those that want exits whatever they cost; answers are the same in any case."""
    monkeypatch.setattr(draft_trials, "_MANY", {False: 1000, True: 1000})
    engine, _ = fake_engine(leave_share=0.0, num_blocks=40, drafts=True)
    governor = host_of(engine).governor
    governor.exits_save = lambda rows, beyond=0.0: save  # type: ignore[method-assign]
    plain = request("a", [1, 2, 3], 12, ExitMode.ADAPTIVE)
    always = replace(plain, request_id="b", exits=replace(plain.exits, always=True))
    done, _ = run(engine, [plain, always])
    assert [each.token_ids for each in done] == [expected_answer([1, 2, 3], 12)] * 2
    found = [each.stats.accepted for each in done if each.stats is not None]
    assert found[1] == 0
    assert (found[0] > 0) is not save
    guessed = TokenSource.HEAD in done[0].sources or TokenSource.NGRAM in done[0].sources
    assert guessed is not save
