"""Command lines of the benchmarks: ``offramp bench``, ``bench engine`` and ``bench kernels``.

``offramp bench`` measures modes and peers side by side, with quality and executed layers beside
speed. Rounds interleave what is measured (off, adaptive, peer, peer, adaptive, ...), so a machine
whose speed drifts drifts for all. It reports only if mode ``off`` gives transformers' own tokens
or, with other weights than fp32, tokens that fp32 agrees with, and, beside a peer, only from a
quiet machine.

``offramp bench engine`` measures what exits are worth in the decode loop, with random weights.
Tokens leave where a given distribution of depths says, whatever the exits score; all that an exit
costs is really run. So a GPU's throughput can be measured as a function of depth for a model
without trained exits. It reports only if the loop makes the tokens of single steps.

``offramp bench decisions`` asks a server questions with fixed answers about labelled inputs:
questions a second, accuracy, calibration and depth, with exits off and on.

``offramp bench forms`` measures what it costs to hold answers to a form, and what text that a form
forces spares.

``offramp bench kernels`` measures how close each kernel comes to what the device can do. It
reports only if every op computes what its reference does. On a CPU the references are timed, which
rehearses a run on a GPU.

All print tables and last a line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offramp.models.config import Weights
from offramp.server.bench.common import BenchError, Refused, Report, Say, UsageError

Bench = Callable[[argparse.Namespace, str, Say], Report]
"""Checks, then measures; given the options, the whole command, and what takes progress."""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that the first word names; status 1 if it refuses to report."""
    kind = argv[0] if argv and argv[0] in _BENCHES else ""
    make_parser, module = _BENCHES[kind]
    parser = make_parser()
    args = parser.parse_args(argv[1:] if kind else argv)
    # Imported here so that --help needs neither torch nor transformers.
    from offramp.models.errors import ModelError  # noqa: PLC0415
    from offramp.server.errors import EngineConfigError  # noqa: PLC0415
    from offramp.server.text.prompts import PromptFileError  # noqa: PLC0415

    bench: Bench = importlib.import_module(module).bench
    try:
        report = bench(args, shlex.join(["offramp", "bench", *argv]), _say)
        sys.stdout.write(report.output())
        if report.page is not None and args.markdown is not None:
            _write(args.markdown, report.page)
    except UsageError as error:
        parser.error(str(error))
    except Refused as error:
        _say(f"refused: {error}")
    except (ModelError, PromptFileError, EngineConfigError, BenchError) as error:
        _say(f"{parser.prog}: {error}")
    else:
        return 0
    return 1


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--markdown {path}: {error.strerror}") from error


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def load_parser() -> argparse.ArgumentParser:
    """Options of ``offramp bench``."""
    others = ", ".join(f"offramp bench {kind} --help" for kind in _BENCHES if kind)
    parser = argparse.ArgumentParser(
        prog="offramp bench", allow_abbrev=False, epilog=f"Other benchmarks: {others}"
    )
    _add_load(parser.add_argument_group("Load").add_argument)
    _add_offramp(parser.add_argument_group("Offramp").add_argument)
    _add_peer(parser.add_argument_group("Peer").add_argument)
    return parser


def _add_load(add: Callable[..., Any]) -> None:
    add("--prompts", type=Path, help="prompt file; a built-in set if unset")
    add(
        "--prompt-tokens",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="make every prompt N tokens long, of the prompts' text [0: as they are]",
    )
    add("--concurrency", type=_numbers, default=(1, 4, 16), help="[1,4,16]")
    add("--modes", type=_modes, default=("off", "adaptive"), help="[off,adaptive]")
    add("--max-tokens", type=_at_least(2), default=64, help="tokens an answer [64]")
    add(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="draw the measured answers, with the same seeds in every mode [0: greedy]",
    )
    add("--rounds", type=_at_least(1), default=3, help="measured rounds [3]")
    add("--requests", type=_at_least(1), help="answers a round [2 a stream, at least 4]")
    add("--reference-prompts", type=_at_least(1), default=4, help="checked answers [4]")
    add(
        "--long-prompt",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="also measure the first token of a prompt of N tokens, new and seen [0: do not]",
    )
    add(
        "--profile",
        type=Path,
        metavar="PICTURE",
        help="also draw where the milliseconds of a decode step go (in this process)",
    )


def _add_offramp(add: Callable[..., Any]) -> None:
    add("--model", default="smollm2-135m", help="embedded name, folder, GGUF file or hub id")
    add(
        "--weights",
        choices=tuple(map(str, Weights)),
        default="fp32",
        help="number format of a CPU's weights; for --url, the one that server was given [fp32]",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="[cpu]")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="number format of K,V and, on a GPU, of the weights [float32]",
    )
    add(
        "--kv-cache-dtype",
        choices=("auto", "float32", "float16", "int16"),
        default="auto",
        help="number format of K,V [auto: int16 beside weights of 4 and 8 bits, else as --dtype]",
    )
    add(
        "--activation-dtype",
        choices=("auto", "int8", "int16"),
        default="auto",
        help="inputs of products with weights of 4 and 8 bits [auto: int16, and int8 for adaptive "
        "requests whose quality allows it, where that is faster]",
    )
    add("--exits", default="auto", help='exit file, "auto" or "none"')
    add("--draft-head", default="auto", help='draft head, "auto" or "none"')
    add("--exit-threshold", type=float, help="score instead of the calibrated one")
    add("--exit-quality", type=float, help="agreement promised [0.98 if reached]")
    add(
        "--kv-fill",
        choices=("auto", "project", "copy", "recompute"),
        default="project",
        help="how K,V of skipped layers are made [project]",
    )
    add("--threads", type=int, default=0, help="CPU threads; 0 is torch's choice")
    add(
        "--serve",
        action=argparse.BooleanOptionalAction,
        help="measure a server started in a process of its own [with --peer llamacpp or vllm]",
    )
    add("--url", help="measure the server there; in this process if unset")
    add("--api-key", help="key of that server")


def _add_peer(add: Callable[..., Any]) -> None:
    add(
        "--peer",
        choices=("llamacpp", "vllm", "transformers", "transformers-batching"),
        help="measure this beside Offramp (transformers: generate, fp32, on the CPU; "
        "transformers-batching: its continuous batching, device and numbers as ours); a server "
        "under --url needs --no-enable-prefix-caching",
    )
    add("--peer-gguf", type=Path, help="llama.cpp's model file [the embedded model's own]")
    add("--peer-python", metavar="PATH", help="the Python of an environment with vLLM")
    add("--noisy", action="store_true", help="report even if the machine is not quiet")


def engine_parser() -> argparse.ArgumentParser:
    """Options of ``offramp bench engine``."""
    parser = argparse.ArgumentParser(prog="offramp bench engine", allow_abbrev=False)
    _add_random_model(parser.add_argument_group("Model").add_argument)
    _add_decoding(parser.add_argument_group("Load").add_argument)
    return parser


def _add_random_model(add: Callable[..., Any]) -> None:
    add(
        "--model-shape",
        default="llama-3-8b",
        help="llama-3-8b, llama-3.2-1b, smollm2-135m or tiny [llama-3-8b]",
    )
    add("--weights", choices=("random",), default="random", help="[random]")
    add("--exits", type=_layers, metavar="LAYERS", help="[at 1/4, 1/2 and 3/4 of the stack]")
    add("--exit-width", type=_at_least(1), help="adapter's inner width [1024]")
    add("--exit-gate", type=_at_least(1), help="gate's inner width [256]")
    add("--exit-vocab", type=_at_least(2), metavar="N", help="tokens that exits tell apart [all]")
    add(
        "--exit-trace",
        default="0.6",
        metavar="TRACE",
        help="mean share of the layers that a token takes, spread over exits with maximum entropy, "
        "or layer:share pairs like 8:0.4,16:0.2,32:0.4 [0.6]",
    )
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="[bf16; fp32 on a CPU]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")


def _add_decoding(add: Callable[..., Any]) -> None:
    add("--batch", type=_layers, default=(1, 8, 32, 128), help="[1,8,32,128]")
    add("--context", type=_at_least(1), default=512, help="tokens that stand before [512]")
    add(
        "--tokens",
        type=_at_least(1),
        default=64,
        help="launches of all segments a round, up to a token a slot each [64]",
    )
    add("--rounds", type=_at_least(1), default=2, help="measured rounds [2]")
    add(
        "--hold",
        choices=("latency", "throughput", "off"),
        default="latency",
        help="when tokens wait for more rows, as `offramp serve --exit-hold` [latency]",
    )
    add(
        "--on-paper",
        type=_rate,
        metavar="BYTES_PER_S",
        help="run nothing: what exits could be worth if reading bytes at this rate were all",
    )
    add("--seed", type=int, default=0, help="of weights and draws [0]")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables there")


def kernels_parser() -> argparse.ArgumentParser:
    """Options of ``offramp bench kernels``."""
    parser = argparse.ArgumentParser(prog="offramp bench kernels", allow_abbrev=False)
    add, positive = parser.add_argument, _at_least(1, "must be positive")
    add("--model-shape", metavar="NAME", help="sizes of this model [llama-3-8b; tiny on a CPU]")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="number format [bf16; fp32 on a CPU]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    add("--rows", type=_numbers, default=(1, 8, 32, 128), help="rows of a launch [1,8,32,128]")
    add("--context", type=positive, default=1024, metavar="N", help="tokens of a text [1024]")
    add("--ops", type=lambda text: text.split(","), default=(), help="names of ops [all]")
    add("--tiles", action="store_true", help="also time other tile sizes of the counted products")
    add("--seconds", type=float, default=0.1, metavar="S", help="length of a timing [0.1]")
    add("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    return parser


def decisions_parser() -> argparse.ArgumentParser:
    """Options of ``offramp bench decisions``."""
    parser = argparse.ArgumentParser(prog="offramp bench decisions", allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="inputs: .jsonl, .json, .csv, .tsv")
    add("--text", type=lambda text: text.split(","), default=["text"], help="its fields [text]")
    add("--label", help="field with the answer; without, only agreement is judged")
    add("--instructions", required=True, help="the question")
    add("--type", choices=("choice", "predicate", "score"), default="choice", help="[choice]")
    add(
        "--labels",
        type=answer_values,
        required=True,
        help="answers in order, with their values in the file: negative=0,positive=1",
    )
    add("--rows", type=_at_least(1), default=200, help="inputs a round [200]")
    add("--rounds", type=_at_least(1), default=3, help="measured rounds [3]")
    add("--modes", type=_modes, default=("off", "adaptive"), help="[off,adaptive]")
    add("--quality", type=float, help="asked of adaptive answers [the server's own]")
    add("--task", help='trained task to ask, or "none" [the one with this question]')
    add(
        "--calibration",
        choices=("contextual", "none"),
        default="contextual",
        help="of answers that no task gives [contextual]",
    )
    add("--permutations", type=_at_least(1), default=1, help="orders of the options [1]")
    add("--questions", type=_numbers, default=(1,), help="questions about an input at once [1]")
    add("--concurrency", type=_numbers, default=(1, 8), help="requests in flight [1,8]")
    add("--model", default="smollm2-135m", help="embedded name, folder, GGUF file or hub id")
    add("--decision-heads", default="auto", help='file, "auto" or "none"')
    add("--weights", choices=tuple(map(str, Weights)), default="auto", help="[auto]")
    add("--threads", type=int, default=0, help="CPU threads; 0 is torch's choice")
    add("--url", help="measure the server there; one of its own if unset")
    add("--api-key", help="key of that server")
    add(
        "--peer",
        choices=("llamacpp", "transformers"),
        help="also ask this for the first token behind the same prompts (transformers: fp32, here, "
        "one after the other)",
    )
    add("--peer-gguf", type=Path, help="llama.cpp's model file [the embedded model's own]")
    return parser


def forms_parser() -> argparse.ArgumentParser:
    """Options of ``offramp bench forms``."""
    parser = argparse.ArgumentParser(prog="offramp bench forms", allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="embedded name, folder, GGUF file or hub id")
    add("--weights", choices=tuple(map(str, Weights)), default="auto", help="[auto]")
    add("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
    add("--modes", type=_modes, default=("off", "lossless"), help="[off,lossless]")
    add("--concurrency", type=_numbers, default=(1, 16), help="streams [1,16]")
    add("--max-tokens", type=_at_least(16), default=320, help="longest answer [320]")
    add("--rounds", type=_at_least(1), default=5, help="measured rounds [5]")
    return parser


def answer_values(text: str) -> tuple[tuple[str, str], ...]:
    """Answers with their values in a file, of ``negative=0,positive=1``."""
    pairs = [part.partition("=") for part in text.split(",")]
    found = tuple((name.strip(), (value if sign else name).strip()) for name, sign, value in pairs)
    if len(found) < 2 or any(len(set(column)) < len(found) for column in zip(*found, strict=True)):
        raise argparse.ArgumentTypeError("must be two or more different answers")
    return found


_BENCHES = {
    "": (load_parser, "offramp.server.bench.run"),
    "decisions": (decisions_parser, "offramp.server.bench.decisions"),
    "engine": (engine_parser, "offramp.server.bench.engine.run"),
    "forms": (forms_parser, "offramp.server.bench.forms"),
    "kernels": (kernels_parser, "offramp.server.bench.kernels.run"),
}
"""Parser and module of each benchmark, by the word behind ``bench``."""


def _at_least(least: int, message: str = "must be at least {}") -> Callable[[str], int]:
    """Reads whole numbers from ``least`` up."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(message.format(least))
        return value

    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError("must be 0 to 2")
    return number


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_at_least(1, "must be positive"), text.split(",")))


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(_at_least(1), text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError("write whole numbers like 8,16,24") from None


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if not set(modes) <= {"off", "adaptive", "lossless"}:
        raise argparse.ArgumentTypeError("modes are: off, adaptive, lossless")
    return modes
