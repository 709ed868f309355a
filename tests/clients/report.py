"""What the parts found, as a table for a terminal and as the page docs/conformance.md."""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import xllamacpp

from offramp import __version__
from tests.clients.suites import CLIENT, JUDGE, Part

PASSED, FAILED, SKIPPED, SCORE = "passed", "failed", "skipped", "score"
_TITLES = {"offramp": f"Offramp {__version__}", "llamacpp": "llama.cpp's server"}
_DETAIL_CHARS = 220


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check: passed, failed or skipped; or a score, which is a figure and no check."""

    check: str
    outcome: str
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PartResult:
    """A part's checks; ``reason`` says why it did not run, or not to its end."""

    part: Part
    version: str
    outcomes: list[Outcome]
    reason: str
    seconds: float = 0.0

    def count(self, outcome: str) -> int:
        """How many checks ended so."""
        return sum(each.outcome == outcome for each in self.outcomes)

    def details(self, outcome: str) -> list[tuple[str, str]]:
        """Names of checks that ended so, and why; those with the same reason together."""
        names: dict[str, list[str]] = {}
        for each in self.outcomes:
            if each.outcome == outcome:
                names.setdefault(each.detail, []).append(each.check)
        return [("; ".join(checks), detail) for detail, checks in names.items()]

    def good(self) -> bool:
        """Whether all checks that apply passed."""
        return not self.reason and not self.count(FAILED)

    def score(self) -> str:
        """Passed checks of those that apply, or why there are none."""
        if not self.outcomes:
            return f"not run: {self.reason}"
        text = f"{self.count(PASSED)} of {self.count(PASSED) + self.count(FAILED)}"
        if self.count(SKIPPED):
            text += f", {self.count(SKIPPED)} skipped"
        return text + (f"; stopped: {self.reason}" if self.reason else "")

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "part": self.part.name,
            "version": self.version,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "checks": [asdict(each) for each in self.outcomes],
        }


Results = Mapping[str, Sequence[PartResult]]


def table(results: Results) -> str:
    """Scores of all parts and the checks that failed, as plain text."""
    lines = []
    for system, found in results.items():
        lines.append(f"\n{_TITLES[system]}")
        for result in found:
            mark = "ok  " if result.good() else "FAIL"
            name = f"{result.part.name} {result.version}"
            lines.append(f"  {mark}  {name:<46} {result.score()}")
            lines += [f"        {checks}: {text}" for checks, text in result.details(FAILED)]
    return "\n".join(lines)


def page(results: Results) -> str:
    """The page docs/conformance.md."""
    today = dt.datetime.now(tz=dt.UTC).date()
    systems = list(results)
    peer = f", llama.cpp as xllamacpp {xllamacpp.__version__}" if "llamacpp" in systems else ""
    if peer:
        peer += " (one server, without its switch for embeddings; it offers tools to models whose"
        peer += " template has them, which this one's has not)"
    lines = [
        "# Conformance",
        "",
        "Client libraries and third-party judges against a live server of SmolLM2-135M-Instruct,",
        "one thread, `--require-model` (judges expect that a request without a model is refused)",
        "and `--max-model-len 2048` (they set no bound to sampled answers).",
        "This page is written by `make test-clients`; do not edit it.",
        "",
        f"{today:%d %B %Y}, Offramp {__version__}{peer}, Python {platform.python_version()}.",
        "",
        "A check has passed or it has not. What does not apply is skipped, with the reason below;",
        "a part whose package could not be installed is *not run*.",
        "",
    ]
    for title, kind in (("Judges", JUDGE), ("Clients", CLIENT)):
        lines += [f"## {title}", "", *_scores(results, kind), ""]
    lines += ["## What each client did", "", *_matrix(results["offramp"]), ""]
    lines += ["## Failed", "", *(_details(results, FAILED) or ["Nothing."]), ""]
    lines += ["## Skipped", "", *(_details(results, SKIPPED) or ["Nothing."]), ""]
    lines += ["## Figures", "", *(_details(results, SCORE) or ["None."]), ""]
    return "\n".join(lines)


def _scores(results: Results, kind: str) -> Iterator[str]:
    systems = list(results)
    yield f"| suite | version | {' | '.join(_TITLES[system] for system in systems)} |"
    yield "|---" * (2 + len(systems)) + "|"
    by_name = {
        system: {result.part.name: result for result in found} for system, found in results.items()
    }
    for name, result in by_name["offramp"].items():
        if result.part.kind == kind:
            cells = [
                by_name[system][name].score() if name in by_name[system] else "not asked"
                for system in systems
            ]
            yield f"| {name} | {result.version} | {' | '.join(map(_cell, cells))} |"


def _matrix(found: Sequence[PartResult]) -> Iterator[str]:
    """Checks against clients; empty where a client has no such call."""
    clients = [result for result in found if result.part.kind == CLIENT and result.outcomes]
    checks = list(dict.fromkeys(each.check for result in clients for each in result.outcomes))
    marks = {PASSED: "yes", FAILED: "**no**", SKIPPED: "skipped", SCORE: ""}
    yield "Empty where the library has no such call.\n"
    yield f"| | {' | '.join(result.part.name for result in clients)} |"
    yield "|---" * (1 + len(clients)) + "|"
    for check in checks:
        cells = [
            next((marks[each.outcome] for each in result.outcomes if each.check == check), "")
            for result in clients
        ]
        yield f"| {check} | {' | '.join(cells)} |"


def _details(results: Results, outcome: str) -> list[str]:
    lines = [
        f"| {system} | {result.part.name} | {checks} | {_cell(detail)} |"
        for system, found in results.items()
        for result in found
        for checks, detail in result.details(outcome)
    ]
    return ["| server | suite | check | detail |", "|---|---|---|---|", *lines] if lines else []


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:_DETAIL_CHARS]
