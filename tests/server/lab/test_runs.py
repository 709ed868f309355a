"""Runs and their judgement: against other ways to compute the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offramp.models.exits.calibration import teacher_forced
from offramp.models.exits.criteria import CRITERIA
from offramp.models.exits.deltas import delta_paths
from offramp.models.exits.training.data import Answer, collect
from offramp.models.exits.training.second_key import Draft
from offramp.models.exits.training.train import exit_scores
from offramp.models.sampling_params import ExitCriterion, ExitSettings
from offramp.server.engine.offline import Finished
from offramp.server.engine.request import GenerationRequest, RequestStats, StepStats
from offramp.server.lab.candidates import score
from offramp.server.lab.options import LabError
from offramp.server.lab.runs import (
    Judgement,
    Run,
    StepLog,
    distinct,
    figures,
    judge,
    percentile,
    priced,
    repetition,
)
from offramp.server.lab.workbench import Workbench, read_exact, write_beside_deltas


@torch.inference_mode()
def test_the_judgement_is_transformers_own(bench: Workbench, easy_dir: Path) -> None:
    """Choices and log probabilities of random answers, in batches of mixed lengths."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(easy_dir, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(4)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 320, (count,), generator=generator).tolist())

    answers = [Answer(ids(3 + i % 5), ids(1 + 9 * i % 31)) for i in range(70)]
    judgement = judge(bench.model, answers)
    assert sum(judgement.tokens) > 1024
    for index in (0, 13, 69):
        item = answers[index]
        logits = theirs(input_ids=torch.tensor([[*item.prompt, *item.answer[:-1]]])).logits[0]
        log_p = logits[len(item.prompt) - 1 :].log_softmax(-1)
        said = torch.tensor(item.answer)
        assert judgement.tokens[index] == len(said)
        assert judgement.wrong[index] == int((log_p.argmax(-1) != said).sum())
        own = float(log_p.gather(1, said[:, None]).sum())
        assert judgement.log_probs[index] == pytest.approx(own, rel=1e-3)


def test_full_depth_agrees_with_itself_and_skips_nothing(bench: Workbench, prompts: Path) -> None:
    run = bench.run(bench.prompts([prompts], 12, 0), ExitSettings())
    found = figures(run, 4)
    assert (found.agreement, found.answer_agreement) == (1.0, 1.0)
    assert (found.mean_depth, found.layers_skipped) == (4.0, 0.0)
    assert found.exit_histogram == {"4": found.tokens}
    assert found.answers == 12
    assert 1 < found.perplexity < 320
    assert found.tokens_per_s > 0
    assert found.e2e_p99_ms >= found.e2e_p50_ms >= found.ttft_ms > 0
    kinds = {kind for kind, *_ in run.steps.seconds}
    assert kinds == {"segments"}


def test_figures_of_known_answers() -> None:
    stats = RequestStats(0.0, layers_executed=30)
    sampling: Any = None
    finished = (
        Finished(
            GenerationRequest("0", (1,), sampling),
            1.0,
            [5] * 8,
            [2] * 8,
            [1.5 + i / 10 for i in range(8)],
            stats,
        ),
        Finished(GenerationRequest("1", (1,), sampling), 1.0, [6, 7], [4, 2], [1.7, 3.0], stats),
    )
    judgement = Judgement((8, 2), (2, 0), (-8.0, -2.0))
    found = figures(Run(finished, judgement, StepLog()), 10)
    assert found.agreement == pytest.approx(0.8)
    assert found.answer_agreement == pytest.approx((0.75 + 1) / 2)
    assert found.perplexity == pytest.approx(math.e)
    assert (found.length, found.mean_depth) == (5.0, 6.0)
    assert found.layers_skipped == pytest.approx(0.4)
    # Eight equal tokens: five 4-grams, one of them new; seven 2-grams, one of them new.
    assert found.repetition == pytest.approx((4 / 5 + 0) / 2)
    assert found.distinct_2 == pytest.approx((1 / 7 + 1) / 2)
    assert found.exit_histogram == {"2": 9, "4": 1}
    assert found.tokens_per_s == pytest.approx(10 / 2.0)
    assert found.ttft_ms == pytest.approx(600)
    assert found.itl_p50_ms == pytest.approx(100)
    assert found.itl_p99_ms == pytest.approx(1300)
    assert found.e2e_p99_ms == pytest.approx(2000)
    assert found.to_json()["agreement"] == 0.8


def test_short_answers_repeat_nothing() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)
    assert distinct([], 2) == 1.0
    assert percentile([], 0.5) == 0.0


def test_equal_steps_have_one_price() -> None:
    """A run made while the machine was slow costs what its steps cost elsewhere."""

    def log(*steps: tuple[str, int, float]) -> StepLog:
        made = StepLog()
        for kind, rows, seconds in steps:
            made.add(StepStats(kind, 0, seconds, 0.5, decode_rows=rows))
        return made

    quick = log(("segments", 4, 1.5), ("segments", 4, 1.5), ("fill", 4, 0.5))
    slow = log(("segments", 4, 9.5), ("fill", 4, 0.5))
    assert priced([quick, slow]) == pytest.approx([2.0 + 2.0 + 1.0, 2.0 + 1.0])


def test_scores_are_those_of_the_exits(bench: Workbench, prompts: Path) -> None:
    """Gate and correctness as training computes them, the rest as the criteria define it."""
    run = bench.run(bench.prompts([prompts], 40, 0), ExitSettings())
    answers = [Answer(item.request.prompt, tuple(item.token_ids)) for item in run.finished]
    states = collect(bench.model, answers)
    scored = score(bench.model, bench.file, states, list(ExitCriterion))
    assert set(scored) == set(CRITERIA)
    for index, head in enumerate(bench.file.heads):
        hidden = states.at[head.layer]
        gate = scored[ExitCriterion.GATE]
        expected = exit_scores(head, hidden, bench.model.config.rms_norm_eps)
        torch.testing.assert_close(gate.scores[index], expected)
        right = Draft(bench.model, None).choices(head, hidden) == states.labels
        assert gate.right[index].equal(right)
        assert 0.5 < float(right.double().mean()) < 1
    both = scored[ExitCriterion.TOP2_GAP].scores
    # These exits have no second key of their own, so it is the gap.
    torch.testing.assert_close(scored[ExitCriterion.TWO_KEY].scores, both)
    assert scored[ExitCriterion.MAX_PROB].scores.ge(both).all()
    assert scored[ExitCriterion.PATIENCE].scores[0].eq(0).all()
    same = scored[ExitCriterion.PATIENCE].scores[1]
    tokens = [
        Draft(bench.model, None).choices(head, states.at[head.layer]) for head in bench.file.heads
    ]
    assert same.eq(1).equal(tokens[0] == tokens[1])


def test_one_depth_for_the_whole_answer(bench: Workbench) -> None:
    """The verdict on the prompt counts for every token of its answer."""
    answers = [Answer((5, 6, 7 + i), (9, 10, 11)) for i in range(4)]
    states = collect(bench.model, answers)
    scored = score(bench.model, bench.file, states, [ExitCriterion.PROMPT_DEPTH])
    found = scored[ExitCriterion.PROMPT_DEPTH]
    for owner in range(4):
        assert found.scores[:, states.answer_of == owner].std(dim=1).eq(0).all()
    assert teacher_forced(found, (0.0, 0.0))[1] == 0.5


def test_prompts_are_drawn_by_the_seed(bench: Workbench, prompts: Path) -> None:
    some = bench.prompts([prompts], 10, 1)
    assert len(some) == len(set(some)) == 10
    assert some == bench.prompts([prompts, prompts], 10, 1)
    assert some != bench.prompts([prompts], 10, 2)


def test_deltas_travel_with_a_new_exit_file(bench: Workbench, exits: Path, tmp_path: Path) -> None:
    """They are found by the exit file's name; a file written in place leaves them alone."""
    part = exits.with_name("exits.deltas-1-of-1.safetensors")
    part.write_bytes(b"deltas")
    file = read_exact(bench, exits)
    target = tmp_path / "new" / "other.safetensors"
    write_beside_deltas(file, exits, target)
    write_beside_deltas(file, exits, exits)
    assert [path.read_bytes() for path in delta_paths(target)] == [b"deltas"]
    assert delta_paths(exits) == [part]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(LabError, match="file"):
        write_beside_deltas(file, exits, blocked / "x.safetensors")
