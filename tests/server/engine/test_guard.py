"""The live guard: it finds drift, tightens, switches off, and leaves the honest alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from offramp.models.exits.points import OperatingPoint
from offramp.models.sampling_params import (
    NEVER,
    ExitCriterion,
    ExitMode,
    ExitSettings,
    KVFill,
    SamplingParams,
)
from offramp.models.step import Step, StepResult
from offramp.server.engine.engine import Engine
from offramp.server.engine.guard import LiveGuard
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import GenerationRequest
from offramp.server.engine.sequence import Sequence
from offramp.server.engine.thresholds import GUARD_OFF, ExitThresholds

from .fake_runner import VOCAB, FakeRunner
from .test_engine_machine import LAYERS, fake_engine

PROMISE = 0.9
SAMPLING = SamplingParams(max_tokens=12, temperature=0.0)
ADAPTIVE = ExitSettings(ExitMode.ADAPTIVE)


def point(quality: float) -> OperatingPoint:
    return OperatingPoint(
        quality=quality,
        confidence=0.95,
        criterion=ExitCriterion.TWO_KEY,
        kv_fill=KVFill.PROJECT,
        thresholds=(0.5, 0.5),
        agreement=quality,
        layers_skipped=0.1,
        mean_depth=10.0,
        prompts=10,
        tokens=100,
    )


class Drifting(FakeRunner):
    """Exits that give wrong tokens at a planted rate, as thresholds of another task would."""

    wrong = 0.0

    def run(self, step: Step) -> StepResult:
        result = super().run(step)
        if not result.leave:
            return result
        tokens = tuple(
            (token + 1) % VOCAB if leave and self._random.random() < self.wrong else token
            for leave, token in zip(result.leave, result.token_ids, strict=True)
        )
        scores = tuple(0.7 if leave else None for leave in result.leave)
        return replace(result, token_ids=tokens, scores=scores)


def engine_with(wrong: float, rate: float = 1.0, *, every_exit: bool = False) -> Engine:
    runner = Drifting(3, 4, 0.9, 0)
    runner.wrong = wrong
    engine, _ = fake_engine(
        num_blocks=40,
        max_batched=40,
        audit_rate=rate,
        every_exit=every_exit,
        runner=runner,
        thresholds=ExitThresholds((0.5, 0.5), [point(PROMISE)], PROMISE),
    )
    return engine


def serve(engine: Engine, prompts: Iterable[int], mode: ExitMode = ExitMode.ADAPTIVE) -> list[int]:
    """Depths of all answers; audits that wait are run as well."""
    requests = [
        GenerationRequest(f"{mode}{n}", (n, n + 1), SAMPLING, ExitSettings(mode)) for n in prompts
    ]
    done = run_all(engine, requests, concurrency=3)
    while engine.has_work:
        engine.step()
    return [layer for item in done for layer in item.exit_layers]


def test_drift_tightens_and_then_switches_off(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_with(wrong=0.5)
    thresholds = engine.thresholds
    before = thresholds.thresholds
    levels = set()
    for start in range(0, 160, 4):
        serve(engine, range(start % 40, start % 40 + 4))
        levels.add(thresholds.guard_level)
    assert levels == {0, 1, 2, 3}
    assert thresholds.guard_level == GUARD_OFF
    assert thresholds.thresholds == (NEVER, NEVER) != before
    assert set(serve(engine, range(5))) == {LAYERS}
    said = [record.getMessage() for record in caplog.records]
    assert [("off" in text, "tightened" in text) for text in said] == [
        (False, True),
        (False, True),
        (True, False),
    ]


def test_exits_that_keep_their_promise_are_left_alone() -> None:
    engine = engine_with(wrong=0.02)
    for start in range(0, 160, 4):
        serve(engine, range(start % 40, start % 40 + 4))
    assert engine.guard.audited > 1000
    assert 0 < engine.guard.disagreements < 0.1 * engine.guard.audited
    assert engine.thresholds.guard_level == 0


def test_disagreements_are_counted_exactly() -> None:
    """Every exit is wrong: all tokens that left early disagree, and no others."""
    engine = engine_with(wrong=1.0)
    depths = serve(engine, range(6))
    assert engine.guard.audited == len(depths)
    assert engine.guard.disagreements == sum(layer < LAYERS for layer in depths)


def test_answers_with_inputs_of_8_bits_are_audited(caplog: pytest.LogCaptureFixture) -> None:
    """With 16; a broken promise ends them."""
    engine = engine_with(wrong=0.0)
    engine.thresholds.allow_coarse(PROMISE, 1.5)
    assert set(serve(engine, range(20))) == {LAYERS}
    assert engine.guard.audited == 20 * 12
    assert engine.guard.disagreements == 0
    for _ in range(20):
        done = Sequence(
            0, GenerationRequest("x", (1,), SAMPLING, ADAPTIVE), 0.0, 3, exits_closed=True
        )
        done.tokens += [0] * 10
        engine.guard.record(done, 5)
    assert engine.thresholds.guard_level > 0
    assert "inputs have 16 bits" in caplog.text
    assert min(serve(engine, range(20, 25))) < LAYERS


def test_what_is_never_audited() -> None:
    """Full-depth and lossless answers, and everything at rate 0."""
    engine = engine_with(wrong=0.0)
    serve(engine, range(5), ExitMode.OFF)
    serve(engine, range(5), ExitMode.LOSSLESS)
    assert engine.guard.audited == 0
    silent = engine_with(wrong=0.0, rate=0.0)
    serve(silent, range(5))
    assert silent.guard.audited == 0


def test_the_rate_is_the_share_of_answers() -> None:
    engine = engine_with(wrong=0.0, rate=0.25)
    serve(engine, range(40))
    assert engine.guard.audited == 10 * 12


def test_without_a_promise_it_only_counts() -> None:
    thresholds = ExitThresholds((0.5,))
    guard = LiveGuard(thresholds, 1.0)
    sequence = Sequence(0, GenerationRequest("a", (1,), SamplingParams(max_tokens=4)), 0.0, 2)
    sequence.make_audit([1, 2, 3, 4, 5])
    for _ in range(100):
        guard.record(sequence, 4)
    assert (guard.audited, guard.disagreements) == (400, 400)
    assert thresholds.guard_level == 0
