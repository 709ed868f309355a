"""What this process may take of the machine: processors and memory, by cgroups too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
# A group's limit and what it uses, of both versions.
_MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def cores() -> int:
    """Processors this process may run on, of all that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that the cgroups grant; None where they set no bound."""
    found: list[float] = []
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        with suppress(ValueError, ZeroDivisionError):
            found.append(int(quota) / int(period))
    return min((quota for quota in found if quota > 0), default=None)


def memory_available(root: Path = _ROOT) -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    lines = _read(root / "proc/meminfo").splitlines()
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for folder in _groups(root, "memory"):
        for most, used in _MEMORY:
            with suppress(ValueError):
                found.append(int(_read(folder / most)) - int(_read(folder / used)))
    return max(0, min(found)) if found else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, those above it too, of both versions."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = Path(path.lstrip("/"))
        # A container sees its own group at the mount, whatever the path says.
        yield from (mount / each for each in (own, *own.parents))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
