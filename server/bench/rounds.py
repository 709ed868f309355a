"""Interleaved rounds: every system answers the same prompts, one after the other, in each round.

From the answers come a round's figures, from the rounds of a system a row of the report, and from
pairs of rounds Offramp's ratios to its peer.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from offramp.models.transformer import Transformer
from offramp.server.bench.common import Say, columns, exit_efficiency, spread
from offramp.server.bench.quiet import Watch
from offramp.server.bench.reference import agreement
from offramp.server.bench.systems import System
from offramp.server.bench.targets import Prompt, Target, Trace
from offramp.server.text.tokenizer import Tokenizer

ROW_COLUMNS = columns(
    "mode {mode} | streams {concurrency} | tokens/s {tokens_per_s:.1f} | x off {speed_up:.3f} | "
    "TTFT ms {ttft_ms:.0f} | ITL p50 {itl_p50_ms:.1f} | ITL p99 {itl_p99_ms:.1f} | "
    "depth {mean_depth:.2f} | passes/token {passes_per_token:.3f} | agreement {agreement:.4f} | "
    "as off {same_answers_as_off:.3f}"
)
RATIO_COLUMNS = columns(
    "Offramp / peer {mode} | streams {concurrency} | figure {figure} | min {min:.3f} | "
    "median {median:.3f} | max {max:.3f}"
)
LONG_PROMPT_ANSWER = 2
"""Tokens behind a long prompt: the first, and one more so that it is not the last."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A target in one of its modes; ``is_peer`` if it is not Offramp."""

    name: str
    target: Target
    is_peer: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds of ``requests`` answers of ``max_tokens`` tokens at ``concurrency``.

    With ``seen_before`` a server sees each round's prompts first, so that whatever it keeps of them
    helps every entry alike. All entries draw a round's answers with the same seeds.
    """

    concurrency: int
    requests: int
    rounds: int
    max_tokens: int
    ignore_eos: bool = False
    seen_before: bool = False
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Round:
    """Figures of one mode at one concurrency in one round; times in milliseconds."""

    tokens_per_s: float
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    e2e_p99_ms: float


@dataclass(slots=True)
class Result:
    """All measured rounds of an entry at one concurrency."""

    entry: Entry
    concurrency: int
    rounds: list[Round] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)


def run_rounds(
    plan: Plan, entries: Sequence[Entry], prompts: Sequence[Prompt], watch: Watch, say: Say
) -> list[Result]:
    """One result an entry; round 0 warms up, each later one takes other prompts."""
    watch.look(f"before {plan.concurrency} streams")
    results = [Result(entry, plan.concurrency) for entry in entries]
    for number in range(plan.rounds + 1):
        first = number * plan.requests
        batch = [prompts[(first + i) % len(prompts)] for i in range(plan.requests)]
        with watch.during(f"round {number} of {plan.concurrency} streams"):
            if plan.seen_before:
                entries[0].target.run(batch, mode="off", concurrency=plan.concurrency, max_tokens=1)
            for result in results if number % 2 else reversed(results):
                say(f"{plan.concurrency} streams, round {number}, {result.entry.name}")
                traces = result.entry.target.run(
                    batch,
                    mode=result.entry.name,
                    concurrency=plan.concurrency,
                    max_tokens=plan.max_tokens,
                    ignore_eos=plan.ignore_eos,
                    temperature=plan.temperature,
                    seed=first,
                )
                if number:
                    result.rounds.append(measure(traces))
                    result.traces += traces
    return results


def measure(traces: Sequence[Trace]) -> Round:
    """Throughput over the wall time of all answers, latencies over their tokens.

    At least one answer has two tokens or more.
    """
    begun = min(trace.submitted_at for trace in traces)
    ended = max(trace.times[-1] for trace in traces)
    tokens = sum(len(trace.token_ids) for trace in traces)
    gaps = [b - a for trace in traces for a, b in pairwise(trace.times)]
    return Round(
        tokens_per_s=tokens / (ended - begun),
        ttft_ms=1000 * statistics.median(t.times[0] - t.submitted_at for t in traces),
        itl_p50_ms=1000 * statistics.median(gaps),
        itl_p99_ms=1000 * _percentile(gaps, 0.99),
        e2e_p99_ms=1000 * _percentile([t.times[-1] - t.submitted_at for t in traces], 0.99),
    )


def mean_depth(traces: Sequence[Trace]) -> float | None:
    """Layers executed for a token over all answers; None where the target does not report them."""
    layers = [trace.layers_executed for trace in traces if trace.layers_executed is not None]
    if len(layers) < len(traces):
        return None
    return round(sum(layers) / sum(len(trace.token_ids) for trace in traces), 4)


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rows(
    results: Sequence[Result], judge: Transformer, without: Collection[int], *, greedy: bool
) -> list[dict[str, Any]]:
    """One row a result; ``without`` as in ``agreement``, which judges peers by the same rule.

    Agreement is that of ``greedy`` answers; drawn ones are compared with those of mode off.
    """
    off = {item.concurrency: item for item in results if item.entry.name == "off"}
    found = [_row(item, off.get(item.concurrency), judge.config.num_layers) for item in results]
    for row, item in zip(found, results, strict=True):
        agreed = agreement(judge, item.traces, without) if greedy else None
        row["agreement"] = None if agreed is None else round(agreed, 4)
    return found


def _row(result: Result, off: Result | None, num_layers: int) -> dict[str, Any]:
    row = {
        "mode": result.entry.name,
        "concurrency": result.concurrency,
        **_medians_of_rounds(result.rounds),
        "mean_depth": mean_depth(result.traces),
    }
    passes = [trace.passes for trace in result.traces if trace.passes is not None]
    if len(passes) == len(result.traces):
        tokens = sum(len(trace.token_ids) for trace in result.traces)
        row["passes_per_token"] = round(sum(passes) / tokens, 4)
        row["drafts"] = _drafts(result.traces)
        row["int8_inputs"] = round(sum(t.coarse for t in result.traces) / len(result.traces), 4)
    if off is None or off is result or result.entry.is_peer:
        return row
    pairs = zip(result.rounds, off.rounds, strict=True)
    ups = [own.tokens_per_s / other.tokens_per_s for own, other in pairs]
    row["speed_up"] = round(statistics.median(ups), 4)
    row["speed_up_min"], row["speed_up_max"] = round(min(ups), 4), round(max(ups), 4)
    if row["mean_depth"] is not None:
        row["exit_efficiency"] = exit_efficiency(row["speed_up"], num_layers, row["mean_depth"])
    same = [a.token_ids == b.token_ids for a, b in zip(result.traces, off.traces, strict=True)]
    row["same_answers_as_off"] = sum(same) / len(same)
    return row


def _drafts(traces: Sequence[Trace]) -> dict[str, dict[str, int]]:
    """Drafted and accepted tokens of all answers, by source."""
    found: dict[str, Counter[str]] = {}
    for trace in traces:
        for source, (drafted, accepted) in trace.drafts.items():
            found.setdefault(source, Counter()).update(drafted=drafted, accepted=accepted)
    return {source: dict(counts) for source, counts in found.items()}


def _medians_of_rounds(rounds: Sequence[Round]) -> dict[str, Any]:
    """Median of every figure over the rounds, with the spread of the throughput."""
    columns = [asdict(item) for item in rounds]
    row: dict[str, Any] = {}
    for name in columns[0]:
        values = [column[name] for column in columns]
        row[name] = round(statistics.median(values), 3)
    speeds = [item.tokens_per_s for item in rounds]
    row["tokens_per_s_min"], row["tokens_per_s_max"] = round(min(speeds), 3), round(max(speeds), 3)
    return row


def ratios(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Offramp's figures over its peer's, round by round.

    A row for each mode of Offramp, concurrency and figure; none without a peer.
    """
    peers = {result.concurrency: result for result in results if result.entry.is_peer}
    return [
        {
            "mode": result.entry.name,
            "concurrency": result.concurrency,
            "figure": figure,
            **spread(
                [getattr(item, figure) for item in result.rounds],
                [getattr(item, figure) for item in peers[result.concurrency].rounds],
            ),
        }
        for result in results
        if not result.entry.is_peer and result.concurrency in peers
        for figure in ("ttft_ms", "itl_p50_ms", "tokens_per_s")
    ]


def long_prompt(tokenizer: Tokenizer, texts: Sequence[str], length: int, number: int) -> Prompt:
    """``length`` tokens made of the texts; every ``number`` begins in another way."""
    text = f"Part {number}. " + "\n".join(texts)
    (ids,) = tokenizer.encode([text], 10**9)
    return (ids * (length // len(ids) + 1))[:length]


def measure_long(
    systems: Sequence[System], prompts: Sequence[Prompt], *, mode: str, say: Say
) -> dict[str, Any]:
    """Time to the first token of prompts that are new, and then seen before.

    Median milliseconds of each system, and their ratios if there are two. The first prompt warms
    up. ``seen`` is None for a system that keeps nothing of a prompt.
    """
    new: dict[str, list[float]] = {system.name: [] for system in systems}
    seen: dict[str, list[float]] = {system.name: [] for system in systems}
    for number, prompt in enumerate(prompts):
        say(f"long prompt, round {number}")
        for system in systems if number % 2 else reversed(systems):
            fresh = _ttft_ms(system.target, prompt, mode)
            again = None if system.again is None else _ttft_ms(system.again, prompt, mode)
            if number:
                new[system.name].append(fresh)
                seen[system.name] += [] if again is None else [again]
    document: dict[str, Any] = {"tokens": len(prompts[0])}
    compared: dict[str, Any] = {}
    for case, found in (("new", new), ("seen", seen)):
        document[f"{case}_ttft_ms"] = {
            name: round(statistics.median(times), 3) if times else None
            for name, times in found.items()
        }
        times = list(found.values())
        compared[case] = spread(*times) if len(times) == 2 and all(times) else None
    return {**document, "ratios": compared}


def _ttft_ms(target: Target, prompt: Prompt, mode: str) -> float:
    (trace,) = target.run(
        [prompt], mode=mode, concurrency=1, max_tokens=LONG_PROMPT_ANSWER, ignore_eos=True
    )
    return 1000 * (trace.times[0] - trace.submitted_at)


def long_prompt_text(found: dict[str, Any]) -> str:
    """Two lines for the report."""
    lines = []
    for case in ("new", "seen"):
        times = ", ".join(
            f"{name} {'-' if value is None else f'{value:.0f} ms'}"
            for name, value in found[f"{case}_ttft_ms"].items()
        )
        ratio = found["ratios"][case]
        shown = f"; ratio {ratio['median']} ({ratio['min']} to {ratio['max']})" if ratio else ""
        lines.append(f"first token of {found['tokens']} prompt tokens, {case}: {times}{shown}\n")
    return "".join(lines)
