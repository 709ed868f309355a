"""``offramp exits``: train, calibrate and evaluate exits and draft heads, and look into files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from offramp.models.config import Weights
from offramp.server.bench.command import answer_values
from offramp.server.lab import calibrate, evaluate
from offramp.server.lab.options import LabError


def main(argv: Sequence[str]) -> int:
    """Run ``offramp exits train|calibrate|eval|info``; returns the exit status."""
    args = _parser().parse_args(argv)
    # Imported here so that --help needs neither torch nor transformers.
    from offramp.models.errors import ModelError  # noqa: PLC0415
    from offramp.server.errors import EngineConfigError  # noqa: PLC0415
    from offramp.server.text.prompts import PromptFileError  # noqa: PLC0415

    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except (ModelError, PromptFileError, EngineConfigError, LabError, OSError) as error:
        sys.stderr.write(f"offramp exits: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offramp exits", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train exit heads", allow_abbrev=False)
    train.set_defaults(command=_train)
    _add_data(train, "exit file to write")
    _add_training(train)
    _add_tuning(train)
    draft = commands.add_parser("train-draft", help="train a draft head", allow_abbrev=False)
    draft.set_defaults(command=_train_draft)
    _add_data(draft, "draft head to write (.draft.safetensors)")
    _add_drafting(draft)
    task = commands.add_parser(
        "train-task", help="train heads that answer one question early", allow_abbrev=False
    )
    task.set_defaults(command=_train_task)
    _add_task(task)
    calibrate.add_parser(commands)
    evaluate.add_parser(commands)
    info = commands.add_parser("info", help="show what an exit file holds")
    info.set_defaults(command=_info)
    info.add_argument("file", type=Path)
    return parser


def _add_data(train: argparse.ArgumentParser, out: str) -> None:
    """Options on what to train on, and where results go."""
    train.add_argument(
        "--model", default="smollm2-135m", help="embedded name, folder, GGUF file or hub id"
    )
    train.add_argument("--out", type=Path, required=True, help=out)
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts", type=Path, nargs="+", help="prompt files; answers are generated"
    )
    source.add_argument(
        "--answers", type=Path, nargs="+", help="answers of an earlier run (JSON lines)"
    )
    train.add_argument("--save-answers", type=Path, help="keep the generated answers here")
    train.add_argument(
        "--weights",
        type=Weights,
        choices=(Weights.AUTO, Weights.INT8, Weights.INT4),
        default=Weights.AUTO,
        help="as the server's: answers, and states along them, are those of rounded weights [auto]",
    )
    train.add_argument("--max-tokens", type=_count, default=192, help="longest answer [192]")
    train.add_argument("--concurrency", type=_count, default=32, help="answers in flight [32]")
    train.add_argument(
        "--work", type=Path, help="folder for finished parts; the same call again continues there"
    )
    train.add_argument("--plot", type=Path, help="draw the training curves as PNG here")
    train.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train [auto]"
    )


def _add_training(train: argparse.ArgumentParser) -> None:
    """Options on the exits and how they learn."""
    train.add_argument("--exit-layers", type=_layers, required=True, help="for example 22,26")
    train.add_argument(
        "--start",
        type=Path,
        help="exit file of the same model, whose adapters and K,V maps training starts from",
    )
    train.add_argument(
        "--vocab", type=_size, default=8192, help="tokens the exits tell apart, 0 for all [8192]"
    )
    train.add_argument(
        "--objective",
        choices=("preference", "agreement"),
        default="agreement",
        help="what gates learn: leaving against going on, or being right [agreement]",
    )
    train.add_argument(
        "--preference-lambda", type=_amount, default=4.0, help="weight of quality, 1/nat [4]"
    )
    train.add_argument(
        "--preference-beta", type=_amount, default=1.0, help="cost of the whole stack [1]"
    )
    train.add_argument("--precision", type=_share, default=0.98, help="of leaving tokens [0.98]")
    train.add_argument("--threshold", type=_amount, help="score to leave at, whatever precision")
    train.add_argument("--width", type=_count, default=1024, help="adapter width [1024]")
    train.add_argument("--router", type=_count, default=256, help="gate width [256]")
    train.add_argument("--epochs", type=_count, default=4, help="over the adapters' answers [4]")
    train.add_argument("--seed", type=_size, default=0)


def _add_drafting(train: argparse.ArgumentParser) -> None:
    """Options on the draft head and how it learns."""
    train.add_argument(
        "--start",
        type=Path,
        help="draft head of the model that training goes on from; --layers and --vocab are its",
    )
    train.add_argument(
        "--layers", type=_layers, help="states it reads [after each third of the layers]"
    )
    train.add_argument(
        "--vocab", type=_size, default=8192, help="tokens it can guess, 0 for all [8192]"
    )
    train.add_argument("--guesses", type=_count, default=3, help="one after another [3]")
    train.add_argument("--epochs", type=_count, default=6, help="over the answers [6]")
    train.add_argument("--minutes", type=_positive, help="end the training after so long")
    train.add_argument(
        "--batch", type=_count, default=2048, help="answer tokens in a training step [2048]"
    )
    train.add_argument("--lr", type=_amount, default=1.2e-3, help="learning rate [1.2e-3]")
    train.add_argument("--seed", type=_size, default=0)


def _add_task(train: argparse.ArgumentParser) -> None:
    """Options on the question and the rows it is asked about."""
    train.add_argument(
        "--model", default="smollm2-135m", help="embedded name, folder, GGUF file or hub id"
    )
    train.add_argument(
        "--out",
        type=Path,
        required=True,
        help="decision heads (.decisions.safetensors); one that exists gets the task added",
    )
    train.add_argument("--data", type=Path, required=True, help="rows: .jsonl, .json, .csv, .tsv")
    train.add_argument(
        "--text", type=_names, default=("text",), help="field with the input, or fields [text]"
    )
    train.add_argument("--label", help="field with the answer; without, the model's own count")
    train.add_argument("--name", required=True, help="of the task, for early_exit.task")
    train.add_argument("--instructions", required=True, help="the question")
    train.add_argument(
        "--type", choices=("choice", "predicate", "score"), default="choice", help="[choice]"
    )
    train.add_argument(
        "--labels",
        type=answer_values,
        required=True,
        help="answers in order, with their values in the file: negative=0,positive=1",
    )
    train.add_argument("--layers", type=_layers, help="where answers may leave [11 of 30]")
    train.add_argument("--seed", type=_size, default=0)


def _add_tuning(train: argparse.ArgumentParser) -> None:
    """Options on tuning the backbone for its exits."""
    train.add_argument(
        "--backbone",
        choices=("frozen", "tuned"),
        default="frozen",
        help="train exits on the model as it is, or tune it for them first [frozen]",
    )
    train.add_argument("--rank", type=_count, default=64, help="of the low-rank deltas [64]")
    train.add_argument("--minutes", type=_positive, help="end the tuning after so long")
    train.add_argument("--tune-epochs", type=_count, default=1, help="over the answers [1]")
    train.add_argument("--tune-lr", type=_amount, default=5e-4, help="learning rate [5e-4]")
    train.add_argument(
        "--batch-tokens", type=_count, default=16384, help="tokens in a tuning step [16384]"
    )
    train.add_argument(
        "--layer-dropout", type=_share, default=0.1, help="rate of the last layer [0.1]"
    )
    train.add_argument(
        "--exit-weight", type=_amount, default=1.0, help="exits' losses against full depth's 1 [1]"
    )
    train.add_argument(
        "--leaving",
        type=_share,
        default=0.5,
        help="share of sequences whose tokens leave while the backbone is tuned [0.5]",
    )
    train.add_argument(
        "--curriculum",
        choices=("rotate", "gradual", "all"),
        default="rotate",
        help="which exits learn in a tuning step [rotate]",
    )


def _size(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a whole number, 0 or more")
    return int(text)


def _count(text: str) -> int:
    if _size(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be a number, 0 or more")
    return value


def _positive(text: str) -> float:
    if _amount(text) == 0:
        raise argparse.ArgumentTypeError("must be over 0")
    return float(text)


def _share(text: str) -> float:
    if not _amount(text) <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return float(text)


def _layers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    layers = tuple(int(part) for part in parts if part.isdecimal())
    if len(layers) != len(parts) or list(layers) != sorted(set(layers)) or layers[0] < 1:
        raise argparse.ArgumentTypeError("must be ascending positive numbers, such as 22,26")
    return layers


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _info(args: argparse.Namespace) -> int:
    from offramp.models.exits import decision_heads  # noqa: PLC0415
    from offramp.models.exits.deltas import delta_paths  # noqa: PLC0415
    from offramp.models.exits.draft_head import SUFFIX, read_draft_metadata  # noqa: PLC0415
    from offramp.models.exits.file import read_metadata  # noqa: PLC0415

    if args.file.name.endswith(SUFFIX):
        sys.stdout.write(json.dumps(read_draft_metadata(args.file), indent=2) + "\n")
        return 0
    if args.file.name.endswith(decision_heads.SUFFIX):
        shown = decision_heads.read_decision_metadata(args.file)
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return 0
    shown = read_metadata(args.file) | {"deltas": [path.name for path in delta_paths(args.file)]}
    sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    return 0


def _train_task(args: argparse.Namespace) -> int:
    from offramp.server.commands.train_task import run  # noqa: PLC0415

    return run(args)


def _train_draft(args: argparse.Namespace) -> int:
    from offramp.server.commands.train_draft import run  # noqa: PLC0415

    return run(args)


def _train(args: argparse.Namespace) -> int:
    from offramp.server.commands.train_exits import run  # noqa: PLC0415

    return run(args)
