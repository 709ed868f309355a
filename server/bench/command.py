"""``offramp bench``: modes and peers side by side, with quality and executed layers beside speed.

Rounds interleave what is measured (off, adaptive, peer, peer, adaptive, ...), so a machine whose
speed drifts drifts for all. Nothing is reported unless mode ``off`` gives transformers' own tokens
or, with other weights than fp32, tokens that fp32 agrees with. Beside a peer, nothing is reported
from a machine that is not quiet. The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

# Other benchmarks, by the first word behind ``bench``; imported only when they are chosen.
BENCHES: Final[dict[str, str]] = {
    "engine": "offramp.server.bench.engine.command:main",
    "kernels": "offramp.server.bench.kernels.command:main",
}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; status 1 if it refuses to report."""
    if argv and argv[0] in BENCHES:
        return _other(BENCHES[argv[0]])(argv[1:])
    args = _parser().parse_args(argv)
    # Imported here so that --help needs neither torch nor transformers.
    from offramp.models.errors import ModelError  # noqa: PLC0415
    from offramp.server.bench.errors import LoadError, NotQuiet, Refused  # noqa: PLC0415
    from offramp.server.bench.prompts import PromptFileError  # noqa: PLC0415
    from offramp.server.bench.run import bench  # noqa: PLC0415
    from offramp.server.engine.build import EngineConfigError  # noqa: PLC0415

    try:
        bench(args, _say)
    except (Refused, NotQuiet) as error:
        _say(f"refused: {error}")
    except (ModelError, PromptFileError, EngineConfigError, LoadError) as error:
        _say(f"offramp bench: {error}")
    else:
        return 0
    return 1


def _other(target: str) -> Callable[[Sequence[str]], int]:
    module, _, function = target.partition(":")
    loaded: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return loaded


def _parser() -> argparse.ArgumentParser:
    others = ", ".join(f"offramp bench {name} --help" for name in BENCHES)
    parser = argparse.ArgumentParser(
        prog="offramp bench", allow_abbrev=False, epilog=f"Other benchmarks: {others}"
    )
    _add_load(parser)
    _add_offramp(parser)
    _add_peer(parser)
    return parser


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Load")
    group.add_argument("--prompts", type=Path, help="prompt file; a built-in set if unset")
    group.add_argument("--concurrency", type=_numbers, default=(1, 4, 16), help="[1,4,16]")
    group.add_argument("--modes", type=_words, default=("off", "adaptive"), help="[off,adaptive]")
    group.add_argument("--max-tokens", type=_at_least(2), default=64, help="tokens an answer [64]")
    group.add_argument("--rounds", type=_at_least(1), default=3, help="measured rounds [3]")
    group.add_argument(
        "--requests", type=_at_least(1), help="answers a round [2 a stream, at least 4]"
    )
    group.add_argument(
        "--reference-prompts", type=_at_least(1), default=4, help="checked answers [4]"
    )
    group.add_argument(
        "--long-prompt",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="also measure the first token of a prompt of N tokens, new and seen [0: do not]",
    )
    group.add_argument(
        "--profile",
        type=Path,
        metavar="PICTURE",
        help="also draw where the milliseconds of a decode step go (in this process)",
    )


def _add_offramp(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Offramp")
    group.add_argument("--model", default="smollm2-135m", help="embedded name, folder or hub id")
    group.add_argument(
        "--weights",
        choices=("fp32", "fp16", "bf16", "int4", "auto"),
        default="fp32",
        help="number format of a CPU's weights; for --url, what that server was told [fp32]",
    )
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="number format of K,V and, on a GPU, of the weights [float32]",
    )
    group.add_argument("--exits", default="auto", help='exit file, "auto" or "none"')
    group.add_argument("--exit-threshold", type=float, help="score instead of the calibrated one")
    group.add_argument("--exit-quality", type=float, help="agreement promised [0.98 if reached]")
    group.add_argument(
        "--kv-fill",
        choices=("auto", "project", "copy", "recompute"),
        default="project",
        help="how K,V of skipped layers are made [project]",
    )
    group.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is torch's choice")
    group.add_argument(
        "--serve",
        action=argparse.BooleanOptionalAction,
        help="measure a server started in a process of its own [with --peer llamacpp]",
    )
    group.add_argument("--url", help="measure the server there; in this process if unset")
    group.add_argument("--api-key", help="key of that server")


def _add_peer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Peer")
    group.add_argument(
        "--peer",
        choices=("llamacpp", "transformers", "transformers-batching"),
        help="measure this beside Offramp (transformers: generate, fp32, on the CPU; "
        "transformers-batching: its continuous batching, device and numbers as ours); a server "
        "under --url needs --no-enable-prefix-caching",
    )
    group.add_argument("--peer-gguf", type=Path, help="its model file [the embedded model's own]")
    group.add_argument(
        "--noisy", action="store_true", help="report even if the machine is not quiet"
    )


def _at_least(least: int) -> Callable[[str], int]:
    """Reads whole numbers from ``least`` up."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return numbers


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if not set(words) <= {"off", "adaptive", "lossless"}:
        raise argparse.ArgumentTypeError("modes are: off, adaptive, lossless")
    return words


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
