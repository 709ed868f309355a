"""Imports run one way: server -> models -> kernels, and kernels stay a leaf."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("server", "models", "kernels")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LEAF_MAY_IMPORT = {"torch", "triton", "offramp"} | sys.stdlib_module_names
FORBIDDEN = {
    "server": (),
    "models": ("offramp.server",),
    "kernels": ("offramp.server", "offramp.models"),
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module and member, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def faults(path: Path, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the imports of one file."""
    name = path.relative_to(root)
    for line, module in imports(path):
        top = module.split(".")[0]
        if module.startswith("."):
            yield f"{name}:{line} imports relatively"
        elif top in FOLDERS:
            yield f"{name}:{line} imports {module} without offramp in front"
        elif any(f"{module}.".startswith(f"{bad}.") for bad in FORBIDDEN[name.parts[0]]):
            yield f"{name}:{line} imports {module} against the direction"
        elif name.parts[0] == "kernels" and top not in LEAF_MAY_IMPORT:
            yield f"{name}:{line} imports {module}; kernels may not"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_direction(path: Path) -> None:
    assert list(faults(path)) == []


def test_each_kind_of_fault_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / "bad.py"
    path.parent.mkdir()
    path.write_text(
        "import torch\nfrom . import x\nimport models.config\nfrom offramp import server\n"
        "def f():\n    from offramp.models.config import ModelConfig\nimport numpy.linalg\n"
    )
    found = [fault.partition(" ")[0] for fault in faults(path, tmp_path)]
    assert sorted(found) == [f"kernels/bad.py:{line}" for line in (2, 3, 4, 6, 7)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_root_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_http_process_does_without_torch() -> None:
    """It takes 350 MB and seconds, and only the engine's process needs it."""
    modules = [
        f"offramp.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for path in (ROOT / "server" / "api").glob("*.py")
    ]
    code = "import sys, importlib; sys.modules['torch'] = None\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in ["offramp.server.serve", *modules]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
