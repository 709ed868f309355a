"""Thresholds learnt while serving."""

from __future__ import annotations

from random import Random

from offramp.models.exits.calibration import OnlineThresholds

from .test_guard import engine_with, serve


def feed(online: OnlineThresholds, wrong_below: float, count: int = 600) -> None:
    """Tokens scored evenly over 0.4 to 1, wrong below a score and now and then above."""
    random = Random(1)
    for _ in range(count):
        score = random.uniform(0.4, 1.0)
        odds = 0.02 if score > wrong_below else 0.6
        online.add(0, score, agreed=random.random() >= odds)


def test_the_threshold_follows_where_exits_are_right() -> None:
    easy, hard = OnlineThresholds(2, 0.9), OnlineThresholds(2, 0.9)
    feed(easy, 0.5)
    feed(hard, 0.85)
    assert easy.over((0.99, 0.7))[0] < hard.over((0.99, 0.7))[0]
    # Nothing was seen of the second exit.
    assert hard.over((0.99, 0.7))[1] == 0.7


def test_few_checks_change_nothing() -> None:
    online = OnlineThresholds(1, 0.9)
    feed(online, 0.5, count=40)
    assert online.over((0.93,)) == (0.93,)


def test_audits_teach_it() -> None:
    """Exits that are mostly wrong: audits find out, and the thresholds in force rise."""
    engine = engine_with(wrong=0.7, every_exit=True)
    thresholds = engine.thresholds
    thresholds.online = OnlineThresholds(2, 0.9)
    before = thresholds.thresholds
    # The second exit sees enough tokens to judge by only once the first one has closed.
    serve(engine, range(40))
    serve(engine, range(40))
    assert all(now > was for now, was in zip(thresholds.thresholds, before, strict=True))
