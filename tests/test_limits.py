"""Sizes at which a function, class or file has become two things."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for folder in ("server", "models", "kernels") for path in (ROOT / folder).rglob("*.py")
)
FILE_LINES = 600
CLASS_LINES = 400
FUNCTION_LINES = 80


def too_long(path: Path) -> Iterator[str]:
    """Name and length of whatever is over its limit."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield f"{path.name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            limit = CLASS_LINES
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = FUNCTION_LINES
        else:
            continue
        # A kernel takes each stride by itself; its arguments are a list, not a second thing.
        first = node.body[0].lineno if _is_kernel(node) else node.lineno
        length = (node.end_lineno or first) - first + 1
        if length > limit:
            yield f"{path.name}:{node.lineno} {node.name}: {length} lines"


def _is_kernel(node: ast.AST) -> bool:
    """Whether a function is compiled by Triton."""
    decorators = getattr(node, "decorator_list", [])
    return any(isinstance(each, ast.Name) and each.id == "jit" for each in decorators)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path: Path) -> None:
    assert list(too_long(path)) == []
