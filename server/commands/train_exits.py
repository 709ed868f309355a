"""What ``offramp exits train`` does: answers, hidden states, exit heads, file and picture."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError, UnsupportedModel
from offramp.models.exits.file import ExitFile
from offramp.models.exits.training.data import (
    Answer,
    AnswerLog,
    read_answers,
    write_answers,
)
from offramp.models.exits.training.pipeline import (
    Part,
    Work,
    check_plot,
    collect_shards,
    plot_curves,
    train_exits,
)
from offramp.models.exits.training.train import Objective, Report, TrainOptions, fit_kv_maps
from offramp.models.exits.training.tune import Curriculum, TuneOptions
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import bytes_per_block
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.loading.sources import resolve
from offramp.models.sampling_params import SamplingParams
from offramp.models.transformer import Transformer
from offramp.server.commands.tune_backbone import (
    Backbone,
    device_of,
    frozen_backbone,
    tuned_backbone,
)
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import EngineOutput, GenerationRequest
from offramp.server.text.prompts import read_prompts
from offramp.server.text.tokenizer import Tokenizer

# Fewer leave nothing to judge on once the rest is split between adapters, gates and keys.
_FEWEST_ANSWERS = 50
_CONTEXT = 2048
_CACHE_GIB = 1.0


class TrainingError(ModelError):
    """The training cannot be done as asked."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One call of the command; ``weights`` are those of the model as it was."""

    args: argparse.Namespace
    folder: Path
    config: ModelConfig
    weights: dict[str, Tensor]
    work: Work
    bars: Progress

    def bar(self, name: str, total: int) -> Callable[[int], None]:
        """A progress bar; to be called with how much is done."""
        task = self.bars.add_task(name, total=total)
        return lambda done: self.bars.update(task, completed=done)


def run(args: argparse.Namespace) -> int:
    """Train as ``args`` say and print the metrics as one line of JSON."""
    if args.plot is not None:
        check_plot()
    device_of(args.device)
    _check_out(args.out)
    folder = resolve(args.model)
    config = config_from_hf(folder)
    _check_exit_layers(args.exit_layers, config)
    weights = load_weights(folder, config, dtype=torch.float32)
    work = Work()
    if args.work is not None:
        work = Work.open(args.work, _identity(args, fingerprint(weights)))
    with Progress(console=Console(stderr=True)) as bars:
        file, backbone = _train(_Job(args, folder, config, weights, work, bars))
    file.save(args.out)
    backbone.save_deltas(args.out)
    if args.plot is not None:
        plot_curves(args.plot, file.metrics["curves"])
    sys.stdout.write(json.dumps(file.metrics) + "\n")
    return 0


def _check_out(path: Path) -> None:
    """Better now than after hours of training."""
    if path.is_dir():
        raise TrainingError(f"--out {path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise TrainingError(f"--out {path}: the folder cannot be written")


def _check_exit_layers(layers: Sequence[int], config: ModelConfig) -> None:
    last = config.num_layers - 1
    for layer in layers:
        if layer > last:
            raise UnsupportedModel("exit layer", layer, f"1 to {last}")


def _identity(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """All that decides the result, as plain values."""
    sources = [_digest(path) for path in args.prompts or args.answers]
    return {
        "model": model,
        "exit_layers": args.exit_layers,
        "sources": sources,
        "generated": bool(args.prompts),
        "max_tokens": args.max_tokens,
        **asdict(_options(args)),
        "backbone": args.backbone,
        "tuning": asdict(_tuning(args)) if args.backbone == "tuned" else None,
    }


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error


def _options(args: argparse.Namespace) -> TrainOptions:
    names = ("width", "router", "epochs", "precision", "threshold", "seed", "vocab")
    return TrainOptions(
        **{name: getattr(args, name) for name in names},
        objective=Objective(args.objective),
        preference_lambda=args.preference_lambda,
        preference_beta=args.preference_beta,
    )


def _train(job: _Job) -> tuple[ExitFile, Backbone]:
    args, work = job.args, job.work
    answers = _answers(job)
    backbone = _backbone(job, answers)
    longest = max(len(item.prompt) + len(item.answer) for item in answers)
    model = Transformer(job.config, backbone.weights, args.exit_layers, longest)
    states = collect_shards(model, answers, work, job.bar("hidden states", len(answers)))
    file = train_exits(
        model,
        states,
        fingerprint=backbone.fingerprint,
        data={
            "answers": len(answers),
            "sources": [path.name for path in args.prompts or args.answers],
            "backbone": args.backbone,
        },
        options=_options(args),
        report=_reporter(job.bars),
        maps=_kv_maps(job, model, answers),
        work=work,
        start={head.layer: head for head in backbone.heads},
    )
    if backbone.report is None:
        return file, backbone
    return replace(file, metrics=file.metrics | {"backbone": backbone.report}), backbone


def _backbone(job: _Job, answers: Sequence[Answer]) -> Backbone:
    device = device_of(job.args.device)
    if job.args.backbone == "frozen":
        return frozen_backbone(job.weights, device)
    return tuned_backbone(
        job.weights,
        job.config,
        answers,
        job.args.exit_layers,
        device=device,
        tuning=_tuning(job.args),
        training=_options(job.args),
        report=_reporter(job.bars),
        work=job.work,
    )


def _tuning(args: argparse.Namespace) -> TuneOptions:
    return TuneOptions(
        rank=args.rank,
        lr=args.tune_lr,
        epochs=args.tune_epochs,
        batch_tokens=args.batch_tokens,
        layer_dropout=args.layer_dropout,
        exit_weight=args.exit_weight,
        curriculum=Curriculum(args.curriculum),
        minutes=args.minutes,
        seed=args.seed,
    )


def _kv_maps(
    job: _Job, model: Transformer, answers: Sequence[Answer]
) -> dict[int, tuple[Tensor, Tensor]]:
    def make() -> Part:
        maps = fit_kv_maps(model, answers, job.bar("K,V maps", len(answers)))
        named = {f"{layer}.map": own[0] for layer, own in maps.items()}
        return named | {f"{layer}.bias": own[1] for layer, own in maps.items()}, {}

    tensors, _ = job.work.part("kv-maps", make)
    return {
        layer: (tensors[f"{layer}.map"], tensors[f"{layer}.bias"]) for layer in model.exit_layers
    }


def _answers(job: _Job) -> list[Answer]:
    args = job.args
    answers = read_answers(args.answers, job.config) if args.answers else _generate(job)
    if len(answers) < _FEWEST_ANSWERS:
        raise TrainingError(f"{len(answers)} answers; at least {_FEWEST_ANSWERS} are needed")
    if args.save_answers is not None:
        write_answers(args.save_answers, answers)
    return answers


def _generate(job: _Job) -> list[Answer]:
    """Greedy full-depth answers of the model itself, by the engine; those kept are not repeated."""
    args = job.args
    log = AnswerLog(job.work.path("answers.jsonl"))
    texts = [text for path in args.prompts for text in read_prompts(path)]
    requests = _requests(job, texts)
    if not requests:
        return []
    engine = build_engine(_engine(job, requests), job.folder, model_name=args.model)
    progress = job.bar("answers", len(requests))
    prompts = {request.request_id: request.prompt for request in requests}
    tokens: dict[str, list[int]] = {name: [] for name in prompts}

    def observe(output: EngineOutput) -> None:
        for event in output.events:
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                answer = Answer(prompts[event.request_id], tuple(tokens[event.request_id]))
                log.add(int(event.request_id), answer)
                progress(len(log.answers))

    missing = [request for request in requests if int(request.request_id) not in log.answers]
    run_all(engine, missing, concurrency=args.concurrency, observe=observe)
    return [answer for _, answer in sorted(log.answers.items()) if answer.answer]


def _engine(job: _Job, requests: Sequence[GenerationRequest]) -> EngineConfig:
    """An engine that holds as many answers as are to be in flight, and no more memory."""
    args = job.args
    sizes = sorted(len(request.prompt) + args.max_tokens for request in requests)
    config = EngineConfig(
        exits="none",
        device=args.device,
        max_num_seqs=args.concurrency,
        max_num_batched_tokens=max(512, 8 * args.concurrency),
        max_model_len=max(2, sizes[-1]),
    )
    dtype = torch.float32 if device_of(args.device).type == "cpu" else torch.bfloat16
    blocks = sum(-(-size // config.block_size) for size in sizes[-args.concurrency :])
    needed = blocks * bytes_per_block(job.config, config.block_size, dtype) / 2**30
    # A block more, against rounding; beyond the cap the engine makes some of the answers wait.
    memory = min(needed * (blocks + 1) / blocks, max(_CACHE_GIB, args.concurrency / 32))
    return config.model_copy(update={"kv_cache_memory": memory})


def _requests(job: _Job, texts: Sequence[str]) -> list[GenerationRequest]:
    """Requests for the prompts that leave room for an answer, named by the prompts' numbers."""
    room = min(_CONTEXT, job.config.max_position_embeddings) - job.args.max_tokens
    if room < 1:
        raise TrainingError(f"--max-tokens {job.args.max_tokens} leaves no room for a prompt")
    tokenizer = Tokenizer.load(job.folder)
    sampling = SamplingParams(
        max_tokens=job.args.max_tokens,
        temperature=0.0,
        stop_token_ids=frozenset(job.config.eos_token_ids),
    )
    requests = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode_chat([{"role": "user", "content": text}], 64 * room)
        if len(ids) <= room:
            requests.append(GenerationRequest(str(index), ids, sampling))
    return requests


def _reporter(bars: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(name: str, done: int, total: int, loss: float) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
        bars.update(tasks[name], completed=done, description=f"{name} (loss {loss:.3f})")

    return report
