"""``offramp bench engine``: what exits are worth in the decode loop, with random weights.

Tokens leave where a given distribution of depths says, whatever the exits score; all that an exit
costs is really run. So throughput can be measured as a function of depth on a GPU for a model that
nobody has trained exits for. Nothing is reported unless the loop makes the tokens of single steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run the bench; status 1 if it cannot be run as asked or refuses to report."""
    args = _parser().parse_args(argv)
    # Imported here so that --help needs no torch.
    from offramp.server.bench.engine.errors import EngineBenchError  # noqa: PLC0415
    from offramp.server.bench.engine.options import read_options  # noqa: PLC0415
    from offramp.server.bench.engine.paper import paper  # noqa: PLC0415
    from offramp.server.bench.engine.report import EngineReport  # noqa: PLC0415
    from offramp.server.bench.engine.run import run  # noqa: PLC0415
    from offramp.server.bench.errors import Refused  # noqa: PLC0415

    command = " ".join(("offramp bench engine", *argv))
    try:
        options = read_options(args)
        if args.on_paper is not None:
            sys.stdout.write(paper(options, args.on_paper, command))
            return 0
        findings = run(options, _say)
    except Refused as error:
        _say(f"refused: {error}")
        return 1
    except EngineBenchError as error:
        _say(f"offramp bench engine: {error}")
        return 1
    report = EngineReport(findings, command)
    sys.stdout.write(f"{report.tables()}\n{report.json()}\n")
    return 0 if args.markdown is None else _write(args.markdown, report.tables())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offramp bench engine", allow_abbrev=False)
    _add_model(parser)
    _add_load(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Model")
    group.add_argument(
        "--model-shape",
        default="llama-3-8b",
        help="llama-3-8b, llama-3.2-1b, smollm2-135m or tiny [llama-3-8b]",
    )
    group.add_argument("--weights", choices=("random",), default="random", help="[random]")
    group.add_argument(
        "--exits", type=_numbers, metavar="LAYERS", help="[at 1/4, 1/2 and 3/4 of the stack]"
    )
    group.add_argument("--exit-width", type=_positive, help="adapter's inner width [1024]")
    group.add_argument("--exit-gate", type=_positive, help="gate's inner width [256]")
    group.add_argument(
        "--exit-vocab", type=_at_least(2), metavar="N", help="tokens that exits tell apart [all]"
    )
    group.add_argument(
        "--exit-trace",
        default="0.6",
        metavar="TRACE",
        help="mean share of the layers that a token takes, spread over exits with maximum entropy, "
        "or layer:share pairs like 8:0.4,16:0.2,32:0.4 [0.6]",
    )
    group.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="[bf16; fp32 on a CPU]")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Load")
    group.add_argument("--batch", type=_numbers, default=(1, 8, 32, 128), help="[1,8,32,128]")
    group.add_argument(
        "--context", type=_positive, default=512, help="tokens that stand before the first [512]"
    )
    group.add_argument(
        "--tokens", type=_positive, default=64, help="rides a round, a token a slot each [64]"
    )
    group.add_argument("--rounds", type=_positive, default=2, help="measured rounds [2]")
    group.add_argument(
        "--hold",
        choices=("latency", "throughput", "off"),
        default="latency",
        help="when deep tokens wait for company, as `offramp serve --exit-hold` [latency]",
    )
    group.add_argument(
        "--on-paper",
        type=_rate,
        metavar="BYTES_PER_S",
        help="run nothing: what exits could be worth if reading bytes at this rate were all",
    )
    group.add_argument("--seed", type=int, default=0, help="of weights and draws [0]")
    group.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")


def _at_least(least: int) -> Callable[[str], int]:
    """Reads whole numbers from ``least`` up."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


_positive = _at_least(1)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("write whole numbers like 8,16,24") from None


def _write(path: Path, text: str) -> int:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        _say(f"offramp bench engine: --markdown {path}: {error.strerror}")
        return 1
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
