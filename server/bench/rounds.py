"""Interleaved rounds: every entry answers the same prompts, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from offramp.server.bench.load import Target, Trace
from offramp.server.bench.quiet import Watch
from offramp.server.bench.report import Round, measure

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A target in one of its modes; ``is_peer`` if it is not Offramp."""

    name: str
    target: Target
    is_peer: bool = False


@dataclass(slots=True)
class Result:
    """All measured rounds of an entry at one concurrency."""

    entry: Entry
    concurrency: int
    rounds: list[Round] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds of ``requests`` answers of ``max_tokens`` tokens at ``concurrency``.

    ``seen_before`` lets a server see each round's prompts first, so that whatever it keeps of them
    helps every entry alike.
    """

    concurrency: int
    requests: int
    rounds: int
    max_tokens: int
    ignore_eos: bool = False
    seen_before: bool = False


def run_rounds(
    plan: Plan,
    entries: Sequence[Entry],
    prompts: Sequence[Prompt],
    watch: Watch,
    say: Callable[[str], None],
) -> list[Result]:
    """One result an entry; round 0 warms up, each later one takes other prompts."""
    watch.look(f"before {plan.concurrency} streams")
    results = [Result(entry, plan.concurrency) for entry in entries]
    for number in range(plan.rounds + 1):
        with watch.during(f"round {number} of {plan.concurrency} streams"):
            _round(number, plan, results, prompts, say)
    return results


def _round(
    number: int,
    plan: Plan,
    results: Sequence[Result],
    prompts: Sequence[Prompt],
    say: Callable[[str], None],
) -> None:
    first = number * plan.requests
    batch = [prompts[(first + i) % len(prompts)] for i in range(plan.requests)]
    if plan.seen_before:
        results[0].entry.target.run(batch, mode="off", concurrency=plan.concurrency, max_tokens=1)
    for result in results if number % 2 else reversed(results):
        say(f"{plan.concurrency} streams, round {number}, {result.entry.name}")
        traces = _answers(plan, result.entry, batch)
        if number:
            result.rounds.append(measure(traces))
            result.traces += traces


def _answers(plan: Plan, entry: Entry, batch: Sequence[Prompt]) -> list[Trace]:
    return entry.target.run(
        batch,
        mode=entry.name,
        concurrency=plan.concurrency,
        max_tokens=plan.max_tokens,
        ignore_eos=plan.ignore_eos,
    )
