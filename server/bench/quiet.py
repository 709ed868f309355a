"""Whether the machine is quiet enough for its figures to mean anything.

Two signs: the share of all CPU time that went to processes other than this one and its children
(time a hypervisor took included), before rounds and during them; and, before them, how much a fixed
piece of work varies in time, which shows what no process list does: neighbours on the same cores
and changing clock rates.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offramp.server.bench.common import Refused, Say

OTHERS_LIMIT = 0.05
SPREAD_LIMIT = 0.25
_SECONDS = 1.0
_WORK = bytes(1 << 20)
_PROC = Path("/proc")

Ticks = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one look at the machine found.

    ``others`` is the share of all CPUs' time that other processes used, None if that is not known.
    ``spread`` is the 90th percentile over the minimum of the times of equal pieces of work, less 1,
    None if none were done.
    """

    when: str
    others: float | None
    spread: float | None

    @property
    def quiet(self) -> bool | None:
        """Whether both are within their limits; None if that could not be judged."""
        if self.spread is not None and self.spread > SPREAD_LIMIT:
            return False
        return None if self.others is None else self.others <= OTHERS_LIMIT

    def __str__(self) -> str:
        others = "an unknown share" if self.others is None else f"{self.others:.1%}"
        word = {True: "quiet", False: "not quiet", None: "could not be judged"}[self.quiet]
        text = f"machine {self.when}: {word}; other processes used {others} of the CPU time"
        text += f" (limit {OTHERS_LIMIT:.0%})"
        if self.spread is not None:
            text += f", equal work varied by {self.spread:.1%} (limit {SPREAD_LIMIT:.0%})"
        return text


def judge(when: str) -> Judgement:
    """Look at the machine for about a second, which this process must otherwise be idle in."""
    before = _ticks()
    times = _work(_SECONDS)
    others = others_share(before, _ticks())
    times.sort()
    return Judgement(when, others, round(times[int(0.9 * len(times))] / times[0] - 1, 4))


def others_share(before: Ticks | None, after: Ticks | None) -> float | None:
    """Share of all CPUs' time between two readings that was not ours; None if not known."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    total, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return round(max(0.0, (busy - own) / total), 4)


@dataclass(slots=True)
class Watch:
    """All judgements of a run; ``strict`` makes a machine that is not quiet an error."""

    strict: bool
    say: Say
    judgements: list[Judgement] = field(default_factory=list)

    def look(self, when: str) -> None:
        """Judge now; raises Refused."""
        self._add(judge(when))

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Judge the time the block takes by what others use of it; raises Refused at its end."""
        before = _ticks()
        yield
        self._add(Judgement(f"during {what}", others_share(before, _ticks()), None))

    def _add(self, judgement: Judgement) -> None:
        self.judgements.append(judgement)
        self.say(str(judgement))
        if self.strict and judgement.quiet is False:
            raise Refused(f"{judgement}; --noisy reports all the same")

    def document(self) -> dict[str, Any]:
        """For the report: ``quiet`` is None where nothing was found but not all could be seen."""
        found = [item.quiet for item in self.judgements]
        quiet = False if False in found else (None if None in found else True)
        return {
            "quiet": quiet,
            "quiet_limits": {"others": OTHERS_LIMIT, "spread": SPREAD_LIMIT},
            "quiet_checks": [{**asdict(item), "quiet": item.quiet} for item in self.judgements],
        }


def _work(seconds: float) -> list[float]:
    """Times of equal pieces of work, done for that long."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begun = time.perf_counter()
        hashlib.sha256(_WORK).digest()
        times.append(time.perf_counter() - begun)
    return times


def _ticks() -> Ticks | None:
    """Ticks of all CPUs so far: in all, busy, and busy for this process and its children."""
    try:
        text = (_PROC / "stat").read_text(encoding="utf-8")
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; what follows is part of user and nice.
    fields = [int(word) for word in text.split("\n", 1)[0].split()[1:9]]
    return sum(fields), sum(fields) - fields[3] - fields[4], _own_ticks()


def _own_ticks() -> int:
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces; what counts follows it.
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        pid = int(path.parent.name)
        # User and system time, its own and of its children that have ended.
        parents[pid], used[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    return sum(ticks for pid, ticks in used.items() if _descends(pid, parents))


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid != 0
