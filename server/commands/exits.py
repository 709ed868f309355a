"""``offramp exits``: train exits for a model, and look into an exit file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from offramp.models.exits.states import Answer
    from offramp.models.exits.train import Report, TrainOptions

# Fewer leave nothing to judge on once the rest is split between adapters and gates.
_FEWEST_ANSWERS = 50


def main(argv: Sequence[str]) -> int:
    """Run ``offramp exits train|info``; returns the exit status."""
    args = _parser().parse_args(argv)
    # Imported here so that --help needs neither torch nor transformers.
    from offramp.models.errors import ModelError  # noqa: PLC0415
    from offramp.server.bench.prompts import PromptFileError  # noqa: PLC0415
    from offramp.server.engine.build import EngineConfigError  # noqa: PLC0415

    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except (ModelError, PromptFileError, EngineConfigError) as error:
        sys.stderr.write(f"offramp exits: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offramp exits", allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train exit heads on a frozen backbone")
    train.set_defaults(command=_train)
    train.add_argument("--model", default="smollm2-135m", help="embedded name, folder or hub id")
    train.add_argument("--out", type=Path, required=True, help="exit file to write")
    train.add_argument("--exit-layers", type=_layers, required=True, help="for example 22,26")
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts", type=Path, nargs="+", help="prompt files; answers are generated"
    )
    source.add_argument(
        "--answers", type=Path, nargs="+", help="answers of an earlier run (JSON lines)"
    )
    train.add_argument("--save-answers", type=Path, help="keep the generated answers here")
    train.add_argument("--max-tokens", type=int, default=192, help="longest answer [192]")
    train.add_argument("--concurrency", type=int, default=32, help="answers in flight [32]")
    train.add_argument("--precision", type=float, default=0.98, help="of leaving tokens [0.98]")
    train.add_argument("--threshold", type=float, help="gate score to leave at, whatever precision")
    train.add_argument("--width", type=int, default=1024, help="adapter width [1024]")
    train.add_argument("--router", type=int, default=256, help="gate width [256]")
    train.add_argument("--epochs", type=int, default=4)
    train.add_argument("--seed", type=int, default=0)
    info = commands.add_parser("info", help="show what an exit file holds")
    info.set_defaults(command=_info)
    info.add_argument("file", type=Path)
    return parser


def _layers(text: str) -> tuple[int, ...]:
    layers = tuple(int(part) for part in text.split(","))
    if list(layers) != sorted(set(layers)) or layers[0] < 1:
        raise argparse.ArgumentTypeError("must be ascending positive numbers, such as 22,26")
    return layers


def _info(args: argparse.Namespace) -> int:
    from offramp.models.exits.file import read_metadata  # noqa: PLC0415

    sys.stdout.write(json.dumps(read_metadata(args.file), indent=2) + "\n")
    return 0


def _train(args: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from offramp.models.errors import UnsupportedModel  # noqa: PLC0415
    from offramp.models.exits.kv_map import fit_kv_maps  # noqa: PLC0415
    from offramp.models.exits.pipeline import train_exits  # noqa: PLC0415
    from offramp.models.exits.states import collect  # noqa: PLC0415
    from offramp.models.families import config_from_hf  # noqa: PLC0415
    from offramp.models.loader import fingerprint, load_weights  # noqa: PLC0415
    from offramp.models.sources import resolve  # noqa: PLC0415
    from offramp.models.transformer import Transformer  # noqa: PLC0415
    from offramp.server.bench.prompts import PromptFileError  # noqa: PLC0415

    folder = resolve(args.model)
    shape = config_from_hf(folder)
    if args.exit_layers[-1] >= shape.num_layers:
        raise UnsupportedModel("exit layer", args.exit_layers[-1], f"1 to {shape.num_layers - 1}")
    with Progress(console=Console(stderr=True)) as bars:
        answers = _answers(args, folder, bars)
        if len(answers) < _FEWEST_ANSWERS:
            raise PromptFileError(f"{len(answers)} answers; at least {_FEWEST_ANSWERS} are needed")
        weights = load_weights(folder, shape, dtype=torch.float32)
        longest = max(len(item.prompt) + len(item.answer) for item in answers)
        model = Transformer(shape, weights, args.exit_layers, longest)
        bar = bars.add_task("hidden states", total=len(answers))
        states = collect(model, answers, lambda done: bars.update(bar, completed=done))
        bar = bars.add_task("K,V maps", total=len(answers))
        maps = fit_kv_maps(model, answers, lambda done: bars.update(bar, completed=done))
        sources = [path.name for path in args.prompts or args.answers]
        file = train_exits(
            model,
            states,
            fingerprint=fingerprint(weights),
            data={"answers": len(answers), "sources": sources},
            options=_options(args),
            report=_reporter(bars),
            maps=maps,
        )
    file.save(args.out)
    sys.stdout.write(json.dumps(file.metrics) + "\n")
    return 0


def _options(args: argparse.Namespace) -> TrainOptions:
    from offramp.models.exits.train import TrainOptions  # noqa: PLC0415

    names = ("width", "router", "epochs", "precision", "threshold", "seed")
    return TrainOptions(**{name: getattr(args, name) for name in names})


def _answers(args: argparse.Namespace, folder: Path, bars: Progress) -> list[Answer]:
    from offramp.models.exits.states import Answer  # noqa: PLC0415

    if args.answers:
        lines = [line for path in args.answers for line in path.read_text().splitlines()]
        rows = [json.loads(line) for line in lines]
        return [Answer(tuple(row["prompt"]), tuple(row["answer"])) for row in rows]
    answers = _generate(args, folder, bars)
    if args.save_answers:
        rows = [{"prompt": item.prompt, "answer": item.answer} for item in answers]
        args.save_answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return answers


def _generate(args: argparse.Namespace, folder: Path, bars: Progress) -> list[Answer]:
    """Greedy full-depth answers of the model itself, by the engine."""
    from offramp.models.exits.states import Answer  # noqa: PLC0415
    from offramp.models.sampling_params import SamplingParams  # noqa: PLC0415
    from offramp.server.bench.prompts import read_prompts  # noqa: PLC0415
    from offramp.server.config import EngineConfig  # noqa: PLC0415
    from offramp.server.engine.build import build_engine  # noqa: PLC0415
    from offramp.server.engine.bulk import run_all  # noqa: PLC0415
    from offramp.server.engine.request import EngineOutput, GenerationRequest  # noqa: PLC0415
    from offramp.server.text.tokenizer import Tokenizer  # noqa: PLC0415

    config = EngineConfig(exits="none", max_num_seqs=args.concurrency, max_model_len=2048)
    engine = build_engine(config, folder, model_name=args.model)
    tokenizer = Tokenizer.load(folder)
    sampling = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=0.0,
        stop_token_ids=frozenset(engine.info.eos_token_ids),
    )
    room = engine.info.max_model_len - args.max_tokens
    requests = []
    for index, text in enumerate(p for path in args.prompts for p in read_prompts(path)):
        ids = tokenizer.encode_chat([{"role": "user", "content": text}], 64 * room)
        if len(ids) <= room:
            requests.append(GenerationRequest(str(index), ids, sampling))
    bar = bars.add_task("answers", total=len(requests))

    def observe(output: EngineOutput) -> None:
        bars.advance(bar, sum(event.finish_reason is not None for event in output.events))

    finished = run_all(engine, requests, concurrency=args.concurrency, observe=observe)
    return [Answer(item.request.prompt, tuple(item.token_ids)) for item in finished]


def _reporter(bars: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(name: str, done: int, total: int, loss: float) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
        bars.update(tasks[name], completed=done, description=f"{name} (loss {loss:.3f})")

    return report
