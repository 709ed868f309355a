"""The faster of guessing and not guessing is kept, whatever the costs of steps say."""

from __future__ import annotations

import random

import pytest

from offramp.server.engine.draft_trials import DraftTrials


class World:
    """Steps of one number of sequences, in a clock of their own."""

    def __init__(self, running: int = 1, *, sampled: bool = False, spared: float = 0.0) -> None:
        self.trials = DraftTrials()
        self.running = running
        self.sampled = sampled
        self.spared = spared
        self.now = 0.0
        self._random = random.Random(0)

    def run(self, steps: int, guessed: float, tokens: float, plain: float) -> float:
        """The share of ``steps`` that guess, where these take so many seconds and make so many."""
        chosen = 0
        for _ in range(steps):
            guessing = self.trials.begin(
                self.running, self.now, sampled=self.sampled, spared=self.spared
            )
            chosen += guessing
            self.now += (guessed if guessing else plain) * self._random.uniform(0.9, 1.1)
            more = guessing and self._random.random() < tokens - 1
            self.trials.end(self.running * (1 + more))
        return chosen / steps


@pytest.mark.parametrize("running", [1, 4])
@pytest.mark.parametrize(
    ("guessed", "tokens", "pays"),
    [(4.0, 1.6, True), (4.0, 1.45, True), (4.0, 1.25, False), (3.3, 1.0, False), (2.0, 1.0, True)],
)
def test_the_faster_way_is_kept(running: int, guessed: float, tokens: float, pays: bool) -> None:  # noqa: FBT001
    world = World(running)
    assert world.run(32, guessed, tokens, 3.0) == (running == 1)
    world.run(1500, guessed, tokens, 3.0)
    share = world.run(4000, guessed, tokens, 3.0)
    assert share > 0.9 if pays else share < 0.1


@pytest.mark.parametrize(("running", "sampled"), [(2, False), (1, True), (4, True)])
def test_guesses_are_made_at_once_where_steps_cost_that_much_less(
    running: int,
    sampled: bool,  # noqa: FBT001
) -> None:
    """Steps that turn out otherwise are believed instead."""
    sure, unsure = (
        World(running, sampled=sampled, spared=0.4),
        World(running, sampled=sampled, spared=0.1),
    )
    assert sure.run(32, 4.0, 1.6, 3.0) == 1
    assert unsure.run(32, 4.0, 1.6, 3.0) == 0
    assert sure.run(4000, 4.0, 1.6, 3.0) > 0.9
    wrong = World(running, sampled=sampled, spared=0.4)
    wrong.run(1500, 4.0, 1.1, 3.0)
    assert wrong.run(4000, 4.0, 1.1, 3.0) < 0.1


@pytest.mark.parametrize(("running", "guessed", "plain"), [(4, 5.0, 3.0), (1, 5.0, 3.0)])
def test_trials_of_a_way_that_is_much_slower_are_few(
    running: int, guessed: float, plain: float
) -> None:
    """Within steps that take 23 s: what they cost beyond the faster way."""
    world = World(running)
    world.run(640, guessed, 1.0, plain)
    begun = world.now
    world.run(4000, guessed, 1.0, plain)
    assert world.now - begun < 1.02 * 4000 * plain


def test_it_follows_a_machine_that_changes() -> None:
    world = World()
    world.run(4000, 4.0, 1.5, 3.0)
    world.run(4000, 4.0, 1.5, 2.2)
    assert world.run(3000, 4.0, 1.5, 2.2) < 0.1
    world.run(8000, 4.0, 1.5, 3.2)
    assert world.run(3000, 4.0, 1.5, 3.2) > 0.9


def test_waiting_for_requests_is_not_a_step() -> None:
    """Nor is a step that met something else."""
    world = World()
    for _ in range(300):
        world.run(20, 4.0, 1.6, 3.0)
        world.trials.interrupt()
        world.now += 5.0
        world.trials.begin(1, world.now)
        world.now += 100.0
        world.trials.end(1)
    assert world.run(3000, 4.0, 1.6, 3.0) > 0.9


def test_sampled_answers_are_guessed_for_once_that_is_seen_to_gain() -> None:
    world = World(sampled=True)
    assert world.run(32, 4.0, 1.6, 3.0) == 0
    world.run(1500, 4.0, 1.6, 3.0)
    assert world.run(3000, 4.0, 1.6, 3.0) > 0.9


@pytest.mark.parametrize("many", [World(8), World(1, sampled=True)], ids=["more", "sampled"])
def test_kinds_of_steps_are_weighed_apart(many: World) -> None:
    few = World(1)
    many.trials = few.trials
    for _ in range(30):
        many.now = few.now
        few.run(100, 4.0, 1.6, 3.0)
        few.trials.interrupt()
        many.now = few.now
        many.run(100, 10.0, 1.1, 8.0)
        few.trials.interrupt()
        few.now = many.now
    assert few.run(1000, 4.0, 1.6, 3.0) > 0.9
    few.trials.interrupt()
    assert many.run(1000, 10.0, 1.1, 8.0) < 0.1
