"""Environments of clients: a virtual one for pip's, a folder of node_modules for npm's.

Each is made once in the folder .venv-clients and again when its file of requirements changes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv-clients"
_REQUIREMENTS = Path(__file__).with_name("requirements")
_INSTALL_S = 900.0


class NotInstalled(Exception):
    """An environment cannot be made; the message is the last line of the installer."""


def install(requirements: str) -> Path:
    """The folder of the environment for a file of requirements/, made if need be."""
    wanted = (_REQUIREMENTS / requirements).read_text(encoding="utf-8")
    folder = FOLDER / Path(requirements).stem
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if requirements.endswith(".txt"):
            _command([sys.executable, "-m", "venv", str(folder)], folder)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            _command([*pip, "-r", str(_REQUIREMENTS / requirements)], folder)
        else:
            npm = shutil.which("npm")
            if npm is None:
                raise NotInstalled("there is no npm on this machine")
            (folder / "package.json").write_text(wanted, encoding="utf-8")
            _command([npm, "install", "--no-audit", "--no-fund", "--loglevel=error"], folder)
        stamp.write_text(wanted, encoding="utf-8")
    return folder


def python(folder: Path) -> str:
    """The interpreter of an environment; that of this process for one of npm."""
    path = folder / "bin" / "python"
    return str(path) if path.exists() else sys.executable


def version(folder: Path, package: str) -> str:
    """The installed version of ``package``."""
    manifest = folder / "node_modules" / package / "package.json"
    if manifest.exists():
        return str(json.loads(manifest.read_text(encoding="utf-8"))["version"])
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python(folder), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _command(words: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=_INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"not installed within {_INSTALL_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise NotInstalled((lines or done.stderr.splitlines() or ["no message"])[-1].strip())
