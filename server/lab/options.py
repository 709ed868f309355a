"""What calibration and evaluation share and what needs no torch: options, the error, the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 (has no public name)
"""The sub-commands of ``offramp exits``."""
Column = tuple[str, str, str]
"""Title, key in the row, and format of the value."""


class LabError(Exception):
    """A calibration or evaluation that cannot be done as asked; the message says why."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options both commands share."""
    parser.add_argument(
        "--model", default="smollm2-135m", help="embedded name, folder, GGUF file or hub id"
    )
    parser.add_argument("--exits", type=Path, required=True, help="exit file of the model")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="prompt files")
    parser.add_argument("--limit", type=positive, help="most prompts to use")
    parser.add_argument("--max-tokens", type=positive, default=64, help="longest answer [64]")
    parser.add_argument("--concurrency", type=positive, default=16, help="in flight [16]")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts' order [0]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    # In lower precision a batch of another size rounds otherwise, which counts as disagreement.
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is torch's choice")


def guarded(
    name: str, work: Callable[[argparse.Namespace], int]
) -> Callable[[argparse.Namespace], int]:
    """``work`` as a command: what a user can put right is one line on stderr and status 1."""

    def command(args: argparse.Namespace) -> int:
        # Imported here so that --help needs neither torch nor transformers.
        from offramp.models.errors import ModelError  # noqa: PLC0415
        from offramp.server.errors import EngineConfigError  # noqa: PLC0415
        from offramp.server.text.prompts import PromptFileError  # noqa: PLC0415

        try:
            return work(args)
        except (LabError, ModelError, PromptFileError, EngineConfigError) as error:
            sys.stderr.write(f"offramp exits {name}: {error}\n")
            return 1

    return command


def say(text: str) -> None:
    """One line of progress, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def qualities(text: str) -> tuple[float, ...]:
    """Several qualities, each above 0.5 and below 1, ascending and different."""
    return tuple(sorted({quality(part) for part in text.split(",")}))


def quality(text: str) -> float:
    """A quality or confidence: above 0.5 and below 1."""
    value = _number(text)
    if not 0.5 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.5 and 1")
    return value


def depths(text: str) -> tuple[float, ...]:
    """Mean depths in layers, above 0."""
    values = tuple(_number(part) for part in text.split(","))
    if not all(value > 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: depths are above 0")
    return values


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of ``rows``; a figure a row lacks is a dash."""
    head = [title for title, _, _ in columns]
    body = [
        [form.format(row[key]) if row.get(key) is not None else "-" for _, key, form in columns]
        for row in rows
    ]
    widths = [max(3, *(len(line[i]) for line in [head, *body])) for i in range(len(head))]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
