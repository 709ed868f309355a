"""When exits, drafts and waiting pay."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.models.costs import CostModel, StepCost
from offramp.models.sampling_params import NEVER
from offramp.server.engine.drafts import AcceptanceRates, HeadAcceptance
from offramp.server.engine.governor import (
    MAX_HEAD_DRAFTS,
    MAX_NGRAM_DRAFTS,
    ExitGovernor,
    HeadPlan,
)
from offramp.server.engine.thresholds import ExitThresholds

MS = 1e-3


def measured(fixed: float, per_row: float) -> StepCost:
    """A cost learnt from exact measurements."""
    cost = StepCost()
    for rows in (1, 2, 4, 8, 16) * 4:
        cost.add(rows, fixed + per_row * rows)
    return cost


def governor(
    *,
    segments: tuple[tuple[float, float], ...] = ((4 * MS, 0.1 * MS), (4 * MS, 0.1 * MS)),
    head: tuple[float, float] = (1 * MS, 0.05 * MS),
    fill: tuple[float, float] = (0.1 * MS, 0.01 * MS),
    max_hold: float = 1.0,
) -> ExitGovernor:
    costs = CostModel.of(len(segments))
    costs.segments = [measured(*cost) for cost in segments]
    costs.head, costs.fill = measured(*head), measured(*fill)
    return ExitGovernor(costs, ExitThresholds(()), max_hold)


@given(fixed=st.floats(1e-5, 1e-1), per_row=st.floats(0, 1e-2), rows=st.integers(1, 16))
def test_costs_are_read_off_between_measurements(fixed: float, per_row: float, rows: int) -> None:
    cost = measured(fixed, per_row)
    assert cost.at(rows) == pytest.approx(fixed + rows * per_row, rel=1e-6)
    assert cost.more(rows - 0.5, 0.5) == pytest.approx(0.5 * per_row if rows > 1 else 0, abs=1e-9)


def test_no_rows_cost_nothing_and_nothing_measured_costs_nothing() -> None:
    assert measured(1.0, 1.0).at(0) == 0.0
    assert StepCost().at(5) == 0.0
    assert not StepCost().known


def test_one_row_count_gives_its_mean() -> None:
    cost = StepCost()
    for seconds in (2.0, 4.0):
        cost.add(3, seconds)
    assert cost.at(3) == pytest.approx(3.0)
    assert cost.more(3) == 0.0


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), min_size=1, max_size=50))
def test_more_rows_never_cost_less(samples: list[tuple[int, float]]) -> None:
    cost = StepCost()
    for rows, seconds in samples:
        cost.add(rows, seconds)
    read = [cost.at(rows) for rows in range(70)]
    assert all(a <= b + 1e-12 for a, b in pairwise(read))
    low, high = min(s for _, s in samples), max(s for _, s in samples)
    assert low - 1e-9 <= cost.at(1) <= high + 1e-9


def test_old_measurements_fade() -> None:
    cost = measured(1.0, 0.0)
    for _ in range(400):
        cost.add(1, 3.0)
        cost.add(2, 3.0)
    assert cost.at(1) == pytest.approx(3.0, rel=0.01)


def test_leaving_pays_when_the_last_stayer_is_gone() -> None:
    """All leave: the steps above are saved whole."""
    made = governor(fill=(0.0, 1 * MS), segments=((4 * MS, 0.0), (4 * MS, 0.2 * MS)))
    assert made.exits_pay(0, leaving=2, staying=0)


def test_leaving_pays_when_a_fill_is_cheaper_than_a_row() -> None:
    assert governor(fill=(0.0, 0.05 * MS)).exits_pay(0, leaving=1, staying=7)


def test_a_refused_exit_is_tried_once_in_a_while() -> None:
    """Costs are learnt from steps that run, so a wrong belief must not last for ever."""
    # One more row costs nothing at 4 to 8 rows, but not behind one.
    made = governor(fill=(0.0, 5 * MS), head=(1 * MS, 0.0))
    for rows in (1, 2, 3, 4):
        for _ in range(200):
            made.costs.segments[1].add(rows, 4 * MS + (0.5 * MS if rows > 1 else 0))
    answers = [made.exits_pay(0, leaving=1, staying=3) for _ in range(10_000)]
    tries = [index + 1 for index, answer in enumerate(answers) if answer]
    assert tries[:4] == [32, 96, 224, 480]
    assert all(later - sooner <= 1024 for sooner, later in pairwise(tries))
    assert tries[-1] > 8900


def test_an_exit_that_paid_is_tried_soon_again() -> None:
    """A try that shows that it pays starts the tries anew."""
    made = governor(segments=((4 * MS, 0.0), (4 * MS, 0.0)), head=(1 * MS, 0.0))
    made.costs.checks[0] = measured(0.2 * MS, 0.0)
    for _ in range(300):
        made.observe_checks(0, checked=8, fired=1)
    assert sum(made.checks_pay(0, 8) for _ in range(600)) == 4
    assert made.checks_pay(0, 1)
    answers = [made.checks_pay(0, 8) for _ in range(32)]
    assert answers == [False] * 31 + [True]


def test_a_thin_group_waits_for_a_crowd_below() -> None:
    """One sequence at a deep segment, many ready for the first: the many go first."""
    made = governor(segments=((1 * MS, 0.0), (40 * MS, 0.0)), head=(0.1 * MS, 0.0))
    assert made.holds(1, waiting=1, ready=30, age=0.0)
    assert not made.holds(1, waiting=30, ready=1, age=0.0)


def test_no_sequence_waits_for_none() -> None:
    assert not governor(segments=((1 * MS, 0.0), (40 * MS, 0.0))).holds(1, 1, ready=0, age=0.0)


@given(
    staying=st.integers(1, 64),
    ready=st.integers(0, 64),
    over=st.floats(0, 100),
    costs=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_no_wait_outlives_the_bound(
    staying: int, ready: int, over: float, costs: tuple[float, float, float, float]
) -> None:
    """Whatever steps cost: at the configured age a group goes."""
    ground, ground_row, deep, deep_row = costs
    made = governor(segments=((ground, ground_row), (deep, deep_row)), max_hold=0.05)
    assert not made.holds(1, staying, ready, age=0.05 + over)


def test_checks_are_not_worth_it_where_rows_are_free() -> None:
    """Beside rows that stay, one that leaves saves nothing, so checks are only probes."""
    made = governor(segments=((4 * MS, 0.0), (4 * MS, 0.0)), head=(1 * MS, 0.0))
    made.costs.checks[0] = measured(0.2 * MS, 0.0)
    for _ in range(300):
        made.observe_checks(0, checked=8, fired=1)
    assert sum(made.checks_pay(0, 8) for _ in range(320)) == 3
    assert all(made.checks_pay(0, 1) for _ in range(320))


def test_a_draft_needs_to_be_right_more_often_where_less_is_saved() -> None:
    cheap_top = governor(segments=((4 * MS, 0.0), (1 * MS, 0.0)))
    dear_top = governor(segments=((1 * MS, 0.0), (4 * MS, 0.0)))
    for made in (cheap_top, dear_top):
        for _ in range(200):
            made.observe_draft(0, right=True)
    assert 0 < dear_top.draft_bound(0, 1) < cheap_top.draft_bound(0, 1) < 1


def test_drafts_that_cost_more_than_they_gain_are_not_made() -> None:
    """But now and then, to see whether that is still so."""
    made = governor(segments=((2 * MS, 0.2 * MS), (2 * MS, 0.2 * MS)), head=(1 * MS, 0.1 * MS))
    made.costs.checks[0] = measured(0.2 * MS, 0.0)
    assert made.draft_bound(0, 1) < 1
    for _ in range(400):
        made.observe_draft(0, right=False)
    # What was decided before stands for a few steps.
    assert [made.draft_bound(0, 1) < 1 for _ in range(15)] == [True] * 15
    bounds = [made.draft_bound(0, 1) for _ in range(320)]
    assert sum(bound < 1 for bound in bounds) == 3


def test_decisions_that_alternate_do_not_take_each_others_probes() -> None:
    made = governor(segments=((2 * MS, 0.2 * MS), (2 * MS, 0.2 * MS)), head=(1 * MS, 0.1 * MS))
    made.costs.checks[0] = measured(9 * MS, 0.0)
    found = [(made.checks_pay(0, 1), made.draft_bound(0, 1) < 1) for _ in range(320)]
    assert [sum(kind) for kind in zip(*found, strict=True)] == [3, 3]


def test_every_exit_gets_its_own_probes() -> None:
    """Checks alternate between the exits; probes counted together would always hit the same one."""
    made = governor(segments=((4 * MS, 0.0),) * 3, head=(1 * MS, 0.0))
    for point in (0, 1):
        made.costs.checks[point] = measured(90 * MS, 0.0)
    found = [[made.checks_pay(point, 4) for point in (0, 1)] for _ in range(320)]
    assert [sum(each) for each in zip(*found, strict=True)] == [3, 3]


def test_no_drafts_where_every_row_costs_the_same() -> None:
    made = governor(segments=((0.0, 1 * MS), (0.0, 1 * MS)), head=(0.0, 1 * MS))
    assert made.draft_bound(0, 1) == NEVER
    assert made.ngram_length(AcceptanceRates([0.9] * 8), 2, 1) == 0


def test_free_rows_are_filled_with_ngram_drafts() -> None:
    made = governor(segments=((4 * MS, 0.0), (4 * MS, 0.0)), head=(1 * MS, 0.0))
    assert made.ngram_length(AcceptanceRates([0.5] * 8), 2, 1) == MAX_NGRAM_DRAFTS
    assert made.ngram_length(AcceptanceRates([0.0] * 8), 2, 1) == 0


def test_the_first_ngram_draft_has_to_gain_a_share_of_the_pass() -> None:
    made = governor(segments=((0.0, 1 * MS), (3 * MS, 1 * MS)), head=(3 * MS, 0.0))
    passed = made.costs.full_pass(4)
    row = 1.1 * (made.costs.full_pass(5) - passed)
    needed = (row + 0.05 * passed) / (passed / 4)
    assert row / (passed / 4) < 0.8 < needed < 0.9
    assert made.ngrams_pay(AcceptanceRates([0.9] * 9), 4)
    assert not made.ngrams_pay(AcceptanceRates([0.8] * 9), 4)


def test_exits_save_where_one_of_them_does() -> None:
    free = governor(segments=((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)), head=(0.0, 0.0))
    free.costs.checks[0] = free.costs.checks[1] = measured(1 * MS, 0.0)
    assert not free.exits_save(1)
    dear = governor(segments=((1 * MS, 0.0), (1 * MS, 0.0), (50 * MS, 0.0)), fill=(0.0, 0.0))
    dear.costs.checks[0], dear.costs.checks[1] = measured(900 * MS, 0.0), measured(1 * MS, 0.0)
    assert dear.exits_save(1)


def test_exits_are_left_for_guesses_that_save_more() -> None:
    """Guesses spare two fifths here, and exits what lies above the first of two."""
    for above, saves in ((1 * MS, False), (60 * MS, True)):
        made = drafting_governor(0.2 * MS)
        made.costs.segments.append(measured(above, 0.0))
        made.costs.checks = [measured(0.01 * MS, 0.0)] * 2
        made.costs.fill = measured(0.01 * MS, 0.0)
        for _ in range(300):
            made.observe_checks(0, checked=8, fired=6)
        spared = made.guesses_spare(1, sampled=False)
        assert spared == pytest.approx(0.4, abs=0.1)
        assert made.exits_save(1)
        assert made.exits_save(1, beyond=spared) is saves


def test_owed_rows_are_recomputed_where_that_is_cheaper_than_a_projection() -> None:
    assert governor(fill=(1 * MS, 0.0)).recompute_pays(1, running=1, owed=1)
    assert not governor(fill=(0.01 * MS, 0.0)).recompute_pays(1, running=1, owed=1)


def drafting_governor(row: float, first: float = 0.5 * MS, chances: float = 0.5) -> ExitGovernor:
    """A pass of 9 ms and ``row`` a row; guesses are right twice ``chances`` as often as it says."""
    made = governor(segments=((8 * MS, row),), head=(1 * MS, 0.0))
    made.costs.first_guess, made.costs.next_guess = measured(first, 0.0), measured(0.1 * MS, 0.0)
    spread = [(0.1, min(1.0, 2 * chances * (tenth + 0.5) / 10)) for tenth in range(10)]
    made.head_acceptance = HeadAcceptance.of(spread)
    return made


def test_the_draft_head_is_asked_where_rows_are_cheap() -> None:
    plan = drafting_governor(0.2 * MS).head_plan(1)
    assert plan.most == MAX_HEAD_DRAFTS
    assert 0 < plan.bound < 0.2
    assert plan.worth == pytest.approx((1.1 * 0.2 / 9.2,) * MAX_HEAD_DRAFTS)


@pytest.mark.parametrize(
    "made",
    [
        drafting_governor(8 * MS),
        drafting_governor(0.2 * MS, first=9 * MS),
        drafting_governor(0.2 * MS, chances=0.02),
    ],
    ids=["rows are dear", "guesses are dear", "guesses are wrong"],
)
def test_the_draft_head_is_not_asked_where_that_loses(made: ExitGovernor) -> None:
    assert made.head_plan(4).most == 0


def test_what_guesses_spare_is_less_than_all_that_are_right() -> None:
    """Half of all guesses are right; five in a row make 1.97 tokens of a pass for free rows."""
    free = drafting_governor(0.0, first=0.0)
    free.costs.next_guess = measured(0.0, 0.0)
    assert free.guesses_spare(1, sampled=False) == pytest.approx(1 - 1 / 1.97, rel=0.02)
    assert free.guesses_spare(2, sampled=False) == pytest.approx(1 - 1 / 1.97, rel=0.02)
    assert 0 < free.guesses_spare(1, sampled=True) < free.guesses_spare(1, sampled=False)


def test_guesses_that_do_not_pay_or_are_not_there_spare_nothing() -> None:
    assert drafting_governor(24 * MS).guesses_spare(4, sampled=False) == 0
    assert governor().guesses_spare(1, sampled=False) == 0


def test_guesses_of_sampled_answers_have_to_pay_at_their_own_rate() -> None:
    """What they are known to be right is learnt from them, and greedy ones do not suffer."""
    made = drafting_governor(0.2 * MS, first=2.5 * MS)
    assert made.head_plan(1).most == MAX_HEAD_DRAFTS
    for _ in range(2000):
        made.observe_sampled(0.8, right=False)
    assert made.sampled_luck < 0.01
    assert made.head_plan(1, made.sampled_luck).most == 0
    assert made.head_plan(1).most == MAX_HEAD_DRAFTS
    for number in range(4000):
        made.observe_sampled(0.8, right=number % 2 == 0)
    assert made.sampled_luck == pytest.approx(0.5 / 0.8, rel=0.05)


def test_the_more_sequences_the_more_guesses_have_to_gain() -> None:
    """Rows are free, and guesses gain a ninth of a pass more than they cost."""
    assert drafting_governor(0.0, first=7.3 * MS).head_plan(1).most == MAX_HEAD_DRAFTS
    assert drafting_governor(0.0, first=7.3 * MS).head_plan(4).most == 0
    assert drafting_governor(0.0, first=6 * MS).head_plan(4).most == MAX_HEAD_DRAFTS


def test_refused_drafts_are_tried_with_few_rows_only() -> None:
    """Costs of rows are learnt from steps that have them; with many, entries are not kept up."""
    few, many = drafting_governor(24 * MS), drafting_governor(24 * MS)
    tries = [few.head_plan(1).most for _ in range(200)]
    assert set(tries) == {0, 1}
    assert 1 <= sum(tries) <= 4
    assert not any(many.head_plan(4).most for _ in range(200))


def test_guesses_are_verified_as_far_as_they_are_likely_to_be_right() -> None:
    made = drafting_governor(0.2 * MS)
    plan = HeadPlan(3, 0.0, (0.3, 0.3, 0.3))
    assert made.worth_verifying(plan, (0.95, 0.95, 0.95), 1.0) == 3
    assert made.worth_verifying(plan, (0.95, 0.25, 0.95), 1.0) == 1
    assert made.worth_verifying(plan, (0.15, 0.95), 1.0) == 0
    # A request whose guesses fare badly has fewer of them verified.
    assert made.worth_verifying(plan, (0.95, 0.95, 0.95), 0.5) == 1
    assert made.worth_verifying(HeadPlan(0, 1.0, ()), (0.95,), 1.0) == 0


def test_the_heads_rates_follow_what_is_seen() -> None:
    rates = HeadAcceptance.of(())
    assert sum(rates.shares) == pytest.approx(1)
    assert rates.mean == pytest.approx(0.5)
    for _ in range(2000):
        rates.saw(0.42)
        rates.add(0.42, accepted=False)
        rates.add(1.0, accepted=True)
    assert rates.rate(0.49) < 0.01
    assert rates.rate(0.95) > 0.99
    assert rates.rate(0.5) == pytest.approx(0.55)
    assert rates.shares[4] > 0.99
    assert rates.gain(1.0, 0.1) < 0.01
