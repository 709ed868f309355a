"""What is in the repository is in the wheel, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("server", "models", "kernels")
# From the source archive is how `python -m build` and package indexes make it; directly is how
# pip does it from a checkout. The two walk the links of offramp/ differently.
COMMANDS = {
    "from-sdist": ["-m", "build", "--no-isolation", "--outdir"],
    "directly": ["-m", "hatchling", "build", "-t", "wheel", "-d"],
}


def repository_files() -> set[str]:
    """Files of the three folders that git has or would take, as named in the wheel."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return {f"offramp/{name}" for name in listed if (ROOT / name).exists()}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_wheel_holds_the_repository(command: list[str], tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == repository_files() | {
        "offramp/__init__.py",
        "offramp/__main__.py",
        "offramp/paths.py",
    }
