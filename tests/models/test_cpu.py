"""Threads follow what others leave of the machine; freed memory stays until it is returned."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from offramp.models.cpu import ThreadGovernor


def governor(most: int = 2) -> tuple[ThreadGovernor, list[int]]:
    calls: list[int] = []
    return ThreadGovernor(most, calls.append), calls


def run(found: ThreadGovernor, seconds: float, share: float, step: float = 0.02) -> None:
    """Steps of 20 ms in which the threads got a share of the CPU time they could have used."""
    for _ in range(round(seconds / step)):
        found.observe(step, step * found.threads * share)


def test_a_machine_of_ones_own_keeps_all_threads() -> None:
    found, calls = governor()
    run(found, 5, 0.98)
    assert calls == []


def test_a_shared_machine_gets_one_thread_and_is_tried_again() -> None:
    found, calls = governor()
    run(found, 0.22, 0.6)
    assert calls == [1]
    run(found, 0.4, 1.0)
    assert calls == [1]
    run(found, 0.2, 1.0)
    assert calls == [1, 2]
    run(found, 5, 0.98)
    assert calls == [1, 2]


def test_rests_grow_while_the_machine_stays_shared_and_start_over_after() -> None:
    found, calls = governor()
    lengths = []
    for _ in range(4):
        run(found, 0.22, 0.6)
        begun = 0.0
        while found.threads == 1:
            run(found, 0.02, 1.0)
            begun += 0.02
        lengths.append(round(2 * begun))
    assert lengths == [1, 2, 4, 8]
    run(found, 1, 0.98)
    run(found, 0.22, 0.6)
    run(found, 0.6, 1.0)
    assert calls[-1] == 2


def test_few_steps_are_looked_at_while_nothing_is_amiss() -> None:
    found, calls = governor()
    run(found, 1, 0.98)
    assert sum(found.looks() for _ in range(80)) == 10
    run(found, 0.1, 0.6)
    assert all(found.looks() for _ in range(10))
    run(found, 0.1, 0.6)
    assert calls == [1]
    assert not any(found.looks() for _ in range(10))
    run(found, 0.5, 1.0)
    assert calls == [1, 2]
    # Whether the machine is shared still is to be found out soon.
    assert all(found.looks() for _ in range(10))
    run(found, 0.1, 0.98)
    assert sum(found.looks() for _ in range(80)) == 10


def test_steps_that_were_not_looked_at_decide_nothing() -> None:
    found, calls = governor()
    for _ in range(100):
        found.observe(0.02, None)
    assert calls == []
    run(found, 0.22, 0.6)
    for _ in range(30):
        found.observe(0.02, None)
    assert calls == [1, 2]


def test_one_slice_of_another_process_decides_nothing() -> None:
    found, calls = governor()
    run(found, 0.08, 0.98)
    run(found, 0.1, 0.3)
    run(found, 1, 0.98)
    assert calls == []


def test_a_single_thread_is_not_governed() -> None:
    found, calls = governor(most=1)
    run(found, 60, 0.2)
    assert calls == []


# In a process of its own: what the allocator holds depends on all that ran before.
_CODE = """
from pathlib import Path
import torch
from offramp.models.cpu import keep_freed_memory, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

assert keep_freed_memory()
before = resident()
pieces = [torch.ones(1 << 20) for _ in range(50)]
held = resident()
del pieces
kept = resident()
assert return_freed_memory()
print(held - before, held - kept, kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], check=True, capture_output=True, text=True)
    used, freed, returned = map(int, done.stdout.split())
    assert used > 150
    assert freed < 20
    assert returned > 150


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="clocks of Linux")
def test_what_the_server_uses_is_not_taken_by_others() -> None:
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        alone = ThreadGovernor(2, lambda _: None)
        found = ThreadGovernor(2, lambda _: None, server.pid)
        own = alone.cpu_seconds()
        assert found.cpu_seconds() - own >= 0.2
        server.communicate(b"\n")
    # One that is gone uses nothing.
    assert found.cpu_seconds() - alone.cpu_seconds() < 0.1
