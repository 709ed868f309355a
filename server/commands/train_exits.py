"""What ``offramp exits train`` does: answers, hidden states, exit heads, file and picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from offramp.models.config import ModelConfig, Weights
from offramp.models.errors import UnsupportedModel
from offramp.models.exits.file import ExitFile, check_fit, load_exits
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.data import (
    Answer,
)
from offramp.models.exits.training.pipeline import (
    Part,
    Work,
    check_plot,
    collect_shards,
    plot_curves,
    train_exits,
)
from offramp.models.exits.training.train import (
    Objective,
    TrainOptions,
    fit_kv_maps,
    plain_head,
)
from offramp.models.exits.training.tune import Curriculum, TuneOptions
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
from offramp.server.commands.tune_backbone import (
    Backbone,
    device_of,
    on_device,
    tuned_backbone,
)
from offramp.server.progress import progress


def run(args: argparse.Namespace) -> int:
    """Train as ``args`` say and print the metrics as one line of JSON."""
    if args.plot is not None:
        check_plot()
    as_served = device_of(args.device).type == "cpu" and args.backbone == "frozen"
    if args.weights is not Weights.AUTO and not as_served:
        raise TrainingError(f"--weights {args.weights} is for a frozen backbone on a CPU")
    check_out(args.out)
    folder = resolve(args.model)
    config = config_from_hf(folder)
    _check_exit_layers(args.exit_layers, config)
    stored = StoredWeights(folder, config, dtype=torch.float32)
    own = fingerprint(stored)
    weights: Mapping[str, Tensor] = stored
    if as_served:
        weights = rounded(args.weights, stored, quantized=stored.quantized)
    work = Work()
    if args.work is not None:
        work = Work.open(args.work, _identity(args, own))
    with progress() as show:
        file, backbone = _train(Job(args, folder, config, weights, work, show), own)
    file.save(args.out)
    backbone.save_deltas(args.out)
    if args.plot is not None:
        plot_curves(args.plot, file.metrics["curves"])
    sys.stdout.write(json.dumps(file.metrics) + "\n")
    return 0


def _check_exit_layers(layers: Sequence[int], config: ModelConfig) -> None:
    last = config.num_layers - 1
    for layer in layers:
        if layer > last:
            raise UnsupportedModel("exit layer", layer, f"1 to {last}")


def _identity(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """All that decides the result, as plain values."""
    sources = [digest(path) for path in args.prompts or args.answers]
    return {
        "model": model,
        "exit_layers": args.exit_layers,
        "sources": sources,
        "generated": bool(args.prompts),
        "max_tokens": args.max_tokens,
        "weights": args.weights,
        **asdict(_options(args)),
        "start": None if args.start is None else digest(args.start),
        "backbone": args.backbone,
        "tuning": asdict(_tuning(args)) if args.backbone == "tuned" else None,
    }


def _options(args: argparse.Namespace) -> TrainOptions:
    names = ("width", "router", "epochs", "precision", "threshold", "seed", "vocab")
    return TrainOptions(
        **{name: getattr(args, name) for name in names},
        objective=Objective(args.objective),
        preference_lambda=args.preference_lambda,
        preference_beta=args.preference_beta,
    )


def _train(job: Job, own: str) -> tuple[ExitFile, Backbone]:
    """Exits for the model with fingerprint ``own``."""
    args, work = job.args, job.work
    answers = own_answers(job, args.weights)
    backbone = _backbone(job, own, answers)
    longest = max(len(item.prompt) + len(item.answer) for item in answers)
    model = Transformer(job.config, backbone.weights, args.exit_layers, longest, backbone.recipes)
    states = collect_shards(model, answers, work, job.bar("hidden states", len(answers)))
    file = train_exits(
        model,
        states,
        fingerprint=backbone.fingerprint,
        data={
            "answers": len(answers),
            "sources": [path.name for path in args.prompts or args.answers],
            "backbone": args.backbone,
            "weights": args.weights,
        },
        options=_options(args),
        report=reporter(job.show),
        maps=backbone.maps or _kv_maps(job, model, answers),
        work=work,
        start={head.layer: head for head in backbone.heads},
    )
    if backbone.report is None:
        return file, backbone
    return replace(file, metrics=file.metrics | {"backbone": backbone.report}), backbone


def _backbone(job: Job, own: str, answers: Sequence[Answer]) -> Backbone:
    device = device_of(job.args.device)
    start = _start(job, own, device)
    if job.args.backbone == "frozen":
        if device.type != "cpu":
            return Backbone(on_device(job.weights, device), own, heads=start)
        recipes = integer_recipes(job.args.weights, job.weights)
        return Backbone(job.weights, own, heads=start, recipes=recipes)
    return tuned_backbone(
        job.weights,
        job.config,
        answers,
        start,
        device=device,
        tuning=_tuning(job.args),
        seed=job.args.seed,
        report=reporter(job.show),
        work=job.work,
    )


def _start(job: Job, own: str, device: torch.device) -> tuple[ExitHead, ...]:
    """The heads that training starts with: plain ones, or those of --start."""
    args, options = job.args, _options(job.args)
    if args.start is None:
        norm = job.weights["final_norm"].to(device)
        return tuple(plain_head(layer, norm, options) for layer in args.exit_layers)
    file = load_exits(
        args.start,
        fingerprint=own,
        hidden_size=job.config.hidden_size,
        dtype=torch.float32,
        device=device,
    )
    check_fit(args.start, file, job.config)
    found = {head.layer: head for head in file.heads}
    for layer in args.exit_layers:
        if layer not in found:
            raise TrainingError(f"--start {args.start}: it has no exit after layer {layer}")
        width = found[layer].down.shape[1]
        if width != options.width:
            raise TrainingError(
                f"--start {args.start}: adapters of width {width}; --width is {options.width}"
            )
    return tuple(found[layer] for layer in args.exit_layers)


def _tuning(args: argparse.Namespace) -> TuneOptions:
    options = TuneOptions(
        rank=args.rank,
        lr=args.tune_lr,
        epochs=args.tune_epochs,
        batch_tokens=args.batch_tokens,
        layer_dropout=args.layer_dropout,
        exit_weight=args.exit_weight,
        leaving=args.leaving,
        curriculum=Curriculum(args.curriculum),
        minutes=args.minutes,
        seed=args.seed,
    )
    if args.start is None:
        return options
    # Adapters that were trained before need no head start, and would only be shaken up.
    return replace(options, head_start=0.0, adapter_lr=options.adapter_lr / 3)


def _kv_maps(
    job: Job, model: Transformer, answers: Sequence[Answer]
) -> dict[int, tuple[Tensor, Tensor]]:
    def make() -> Part:
        maps = fit_kv_maps(model, answers, job.bar("K,V maps", len(answers)))
        named = {f"{layer}.map": own[0] for layer, own in maps.items()}
        return named | {f"{layer}.bias": own[1] for layer, own in maps.items()}, {}

    tensors, _ = job.work.part("kv-maps", make)
    return {
        layer: (tensors[f"{layer}.map"], tensors[f"{layer}.bias"]) for layer in model.exit_layers
    }
