"""bench/gpu.sh, rehearsed on a CPU with tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"
REHEARSAL = {
    "DEVICE": "cpu",
    "DTYPE": "fp32",
    "LARGE": "tiny",
    "SMALL": "tiny",
    "ROWS": "1,3",
    "TOKENS": "8",
    "SECONDS_EACH": "0.002",
    "EXIT_VOCAB": "64",
    "OFFRAMP": f"{sys.executable} -m offramp",
    "TESTS": "tests/kernels/test_poison.py",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(out)],
        env=os.environ | REHEARSAL | environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.timeout(160)
def test_every_step_leaves_its_report(tmp_path: Path, tiny_dir: Path) -> None:
    done = run(tmp_path / "out", MODEL=str(tiny_dir))
    assert done.returncode == 0, done.stderr
    names = ("kernels-tiny", "engine-tiny", "real-weights")
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in names}
    assert all(document["command"].startswith("offramp bench") for document in found.values())
    assert {row["mode"] for row in found["real-weights"]["rows"]} == {
        "off",
        "adaptive",
        "transformers-batching",
    }
    for name in names:
        assert (tmp_path / "out" / f"{name}.md").stat().st_size > 100
    assert done.stdout.count("| 0 |") == 5
    assert " passed" in (tmp_path / "out" / "tests.txt").read_text()


@pytest.mark.timeout(160)
def test_a_step_that_fails_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "out", MODEL="", SMALL="no-such-shape")
    assert done.returncode == 1
    assert "no-such-shape" in done.stderr
    assert not (tmp_path / "out" / "engine-no-such-shape.json").exists()
    assert (tmp_path / "out" / "kernels-tiny.json").exists()


def test_without_a_folder_it_says_how(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bench/gpu.sh OUT_FOLDER" in done.stderr
