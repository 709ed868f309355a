"""``offramp bench kernels``: how close each kernel comes to what the device can do.

Every op is checked against its reference first, and nothing is reported if one differs. Then each
is timed for every number of rows beside the time that its bytes and flops take at the ceilings
measured on the same device. On a CPU the references are timed, which rehearses a run on a GPU. The
last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.server.bench.kernels.plan import Plan

_DEFAULT_ROWS = (1, 8, 32, 128)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; status 1 if it refuses to report."""
    parser = _parser()
    args = parser.parse_args(argv)
    # Imported here so that --help does not need torch.
    from offramp.server.bench.errors import Refused  # noqa: PLC0415
    from offramp.server.bench.kernels.run import measure  # noqa: PLC0415

    plan = _plan(parser, args)
    command = shlex.join(["offramp", "bench", "kernels", *argv])
    try:
        report = measure(plan, command, _say)
    except Refused as error:
        _say(f"refused: {error}")
        return 1
    if args.markdown is not None:
        args.markdown.write_text(report.markdown(), encoding="utf-8")
    sys.stdout.write(report.text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offramp bench kernels", allow_abbrev=False)
    parser.add_argument(
        "--model-shape", metavar="NAME", help="sizes of this model [llama-3-8b; tiny on a CPU]"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="number format [bf16; fp32 on a CPU]"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    parser.add_argument(
        "--rows", type=_numbers, default=_DEFAULT_ROWS, help="rows of a launch [1,8,32,128]"
    )
    parser.add_argument(
        "--context", type=_positive, default=1024, metavar="N", help="tokens of a text [1024]"
    )
    parser.add_argument("--ops", type=_words, default=(), help="names of ops [all]")
    parser.add_argument(
        "--tiles", action="store_true", help="also time every cut of the counted products"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.1, metavar="S", help="length of a timing [0.1]"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the tables to this file"
    )
    return parser


def _plan(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Plan:
    """What the options say, with defaults by device; wrong names end the program."""
    import torch  # noqa: PLC0415

    from offramp.models.shapes import MODEL_SHAPES  # noqa: PLC0415
    from offramp.server.bench.formats import DTYPES  # noqa: PLC0415
    from offramp.server.bench.kernels.ops import OPS  # noqa: PLC0415
    from offramp.server.bench.kernels.plan import Plan  # noqa: PLC0415
    from offramp.server.bench.kernels.setup import Shape  # noqa: PLC0415

    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        parser.error("--device cuda: torch finds no CUDA device")
    device = torch.device("cuda" if there and args.device != "cpu" else "cpu")
    on_gpu = device.type == "cuda"
    name = args.model_shape or ("llama-3-8b" if on_gpu else "tiny")
    if name not in MODEL_SHAPES:
        parser.error(f"--model-shape {name}: shapes are {', '.join(MODEL_SHAPES)}")
    unknown = [op for op in args.ops if op not in OPS]
    if unknown:
        parser.error(f"--ops {','.join(unknown)}: ops are {', '.join(OPS)}")
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    return Plan(
        name=name,
        shape=Shape(MODEL_SHAPES[name], dtype, device, args.context),
        # In the table's order: what others are checked with is checked first.
        ops=tuple(op for op in OPS if not args.ops or op in args.ops),
        rows=args.rows,
        seconds=args.seconds,
        tiles=args.tiles,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
