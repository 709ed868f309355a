"""What ``offramp exits train-draft`` does: answers, states along them, a draft head, its file."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from offramp.kernels.weight_formats import GROUP
from offramp.models.config import ModelConfig, Weights
from offramp.models.cpu import keep_freed_memory
from offramp.models.errors import UnsupportedModel
from offramp.models.exits.draft_head import SUFFIX, DraftHead, load_draft_head
from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.draft import DraftOptions, DraftTrainer, new_draft_head
from offramp.models.exits.training.draft_data import DraftFeatures, collect_features
from offramp.models.exits.training.pipeline import Work, check_plot, plot_draft
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.families import config_from_hf
from offramp.models.loading.formats import integer_recipes, rounded
from offramp.models.loading.safetensors import StoredWeights, fingerprint
from offramp.models.loading.sources import resolve
from offramp.models.transformer import Transformer
from offramp.server.commands.own_answers import (
    Job,
    TrainingError,
    check_out,
    digest,
    own_answers,
    reporter,
)
from offramp.server.commands.tune_backbone import device_of, on_device
from offramp.server.progress import progress

# Every so many answers, one is kept aside to judge the head on.
_HELD_OUT = 16


def run(args: argparse.Namespace) -> int:
    """Train as ``args`` say and print the metrics as one line of JSON."""
    if args.plot is not None:
        check_plot()
    device_of(args.device)
    if not args.out.name.endswith(SUFFIX):
        raise TrainingError(f"--out {args.out}: the name of a draft head ends in {SUFFIX}")
    check_out(args.out)
    folder = resolve(args.model)
    config = config_from_hf(folder)
    if args.weights is not Weights.AUTO and device_of(args.device).type != "cpu":
        raise TrainingError(f"--weights {args.weights} is for training on a CPU")
    stored = StoredWeights(folder, config, dtype=torch.float32)
    own = fingerprint(stored)
    start = _start(args, config, own)
    layers = args.layers or _thirds(config) if start is None else start.layers
    _check_layers(layers, config)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as spare, progress() as show:
        kept = args.work or Path(spare) / "work"
        work = Work.open(kept, _identity(args, layers, own))
        weights = rounded(args.weights, stored, quantized=stored.quantized)
        trainer, held_out, data = _train(
            Job(args, folder, config, weights, work, show), layers, start
        )
        file = trainer.file(held_out, own, data)
    file.save(args.out)
    if args.plot is not None:
        plot_draft(args.plot, file.metrics["curve"])
    sys.stdout.write(json.dumps(file.metrics) + "\n")
    return 0


def _start(args: argparse.Namespace, config: ModelConfig, own: str) -> DraftHead | None:
    """The head of --start, on the device of the training."""
    if args.start is None:
        return None
    if args.layers is not None:
        raise TrainingError("--layers: those of the head that --start names are kept")
    head = load_draft_head(args.start, fingerprint=own, config=config).head
    device = device_of(args.device)
    parts: dict[str, Any] = {
        name: tensor.to(device).clone() for name, tensor in head.parameters.items()
    }
    return replace(head, **parts, vocab=head.vocab.to(device))


def _thirds(config: ModelConfig) -> tuple[int, ...]:
    count = config.num_layers
    return tuple(sorted({max(1, count // 3), max(1, 2 * count // 3), count}))


def _check_layers(layers: Sequence[int], config: ModelConfig) -> None:
    count = config.num_layers
    for name, size in (("hidden", config.hidden_size), ("inner", config.intermediate_size)):
        if size % GROUP:
            raise UnsupportedModel(f"{name} size", size, f"multiples of {GROUP}, for 4-bit weights")
    if layers[-1] != count:
        raise UnsupportedModel("--layers", list(layers), f"ascending ones, the last one {count}")


def _identity(args: argparse.Namespace, layers: Sequence[int], model: str) -> dict[str, Any]:
    """All that decides the result, as plain values."""
    return {
        "model": model,
        "layers": layers,
        "sources": [digest(path) for path in args.prompts or args.answers],
        "generated": bool(args.prompts),
        "max_tokens": args.max_tokens,
        "weights": args.weights,
        "start": None if args.start is None else digest(args.start),
        **asdict(_options(args)),
    }


def _options(args: argparse.Namespace) -> DraftOptions:
    names = ("vocab", "guesses", "epochs", "batch", "lr", "minutes", "seed")
    return DraftOptions(**{name: getattr(args, name) for name in names})


def _train(
    job: Job, layers: Sequence[int], start: DraftHead | None
) -> tuple[DraftTrainer, DraftFeatures, dict[str, Any]]:
    """What has trained the head, the answers to judge it on, and what it was trained on."""
    args = job.args
    answers = [item for item in own_answers(job, args.weights) if len(item.answer) > 1]
    longest = max(len(item.prompt) + len(item.answer) for item in answers)
    model, source = _models(job, longest)
    features = collect_features(source, answers, layers, job.work, job.bar("states", len(answers)))
    del source
    held = range(_HELD_OUT - 1, len(answers), _HELD_OUT)
    held_out = features.select(held)
    learnt = features.select([index for index in range(len(answers)) if index not in held])
    head = start or new_draft_head(model, learnt, layers, _options(args))
    trainer = DraftTrainer(model, head, _options(args))
    trainer.train(learnt, held_out, reporter(job.show), job.work.path("draft.pt"))
    data = {
        "answers": len(learnt.answers),
        "tokens": _tokens(learnt.answers),
        "sources": [path.name for path in args.prompts or args.answers],
    }
    return trainer, held_out, data


def _models(job: Job, longest: int) -> tuple[DenseModel, DenseModel | Transformer]:
    """The model that the head learns from, and the one that makes its states.

    Weights that a server would keep in integers are multiplied as there, which takes a fifth of the
    memory; of the whole the head then needs embeddings and last layer alone.
    """
    config, weights = job.config, job.weights
    device = device_of(job.args.device)
    if device.type == "cpu":
        recipes = integer_recipes(job.args.weights, weights)
        if recipes is not None:
            served = Transformer(config, weights, (), longest, recipes)
            return DenseModel(config, weights, longest), served
    whole = DenseModel(config, on_device(dict(weights), device), longest)
    return whole, whole


def _tokens(answers: Sequence[Answer]) -> int:
    return sum(len(item.answer) for item in answers)
