"""From a model's own answers to an exit file: split, train each exit, judge on unseen answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.models.errors import ModelError
from offramp.models.exits.file import ExitFile
from offramp.models.exits.head import ADAPTER, GATE, PREDICTOR, ExitHead
from offramp.models.exits.training.data import Answer, States, collect
from offramp.models.exits.training.second_key import (
    Draft,
    Predictions,
    draft_vocab,
    fit_fuse,
    floor_for,
    full_log_prob,
    predict,
    two_key_scores,
)
from offramp.models.exits.training.train import (
    Objective,
    Report,
    TrainOptions,
    exit_scores,
    fit_predictor,
    new_head,
    preference_targets,
    threshold_for,
    train_adapter,
    train_gate,
)
from offramp.models.transformer import Transformer

Part = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and plain values."""

_OPTIONS = "options.json"
_SHARD = 256
_JUDGE_SHARE = 0.06
_GATE_SHARE = 0.1
_KEY_SHARE = 0.1


class WorkError(ModelError):
    """The work folder belongs to another run, or is damaged."""


class Work:
    """Parts of one run under ``folder``; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, options: Mapping[str, Any]) -> Work:
        """The folder of a run with these ``options`` (plain values), made if it is missing.

        Raises WorkError if it belongs to a run with other options, naming them.
        """
        wanted = json.loads(json.dumps(dict(options)))
        path = folder / _OPTIONS
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise WorkError(f"{path} is damaged: {error}") from error
            differ = sorted(
                name for name in {*wanted, *found} if wanted.get(name) != found.get(name)
            )
            if differ:
                raise WorkError(
                    f"{folder} belongs to a run with other options ({', '.join(differ)}); "
                    "take another folder, or the same options"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        return cls(folder)

    def path(self, name: str) -> Path | None:
        """Where a file of this name lies; None without a folder."""
        return None if self.folder is None else self.folder / name

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """The part of this name: as it was kept, or made now and kept.

        Raises WorkError if what was kept is damaged.
        """
        path = self.path(f"{name}.safetensors")
        if path is None:
            return make()
        if path.exists():
            return _read_part(path)
        tensors, values = make()
        partial = path.with_suffix(".partial")
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(plain, partial, {"values": json.dumps(values)})
        partial.replace(path)
        return _read_part(path)


def _read_part(path: Path) -> Part:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            values = json.loads((file.metadata() or {})["values"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WorkError(f"{path} is damaged; delete it to have it made again: {error}") from error
    return tensors, values


def collect_shards(
    model: Transformer,
    answers: Sequence[Answer],
    work: Work,
    progress: Callable[[int], None] | None = None,
) -> States:
    """As `collect`, in shards of 256 answers that ``work`` keeps as they finish."""
    shards: list[States] = []
    for first in range(0, len(answers), _SHARD):
        own = answers[first : first + _SHARD]

        def make(first: int = first, own: Sequence[Answer] = own) -> Part:
            def note(done: int) -> None:
                if progress is not None:
                    progress(first + done)

            states = collect(model, own, note)
            tensors = {f"at.{layer}": tensor for layer, tensor in states.at.items()}
            rest = {"top": states.top, "labels": states.labels, "answer_of": states.answer_of}
            return tensors | rest, {}

        tensors, _ = work.part(f"states-{first // _SHARD:05d}", make)
        at = {layer: tensors[f"at.{layer}"] for layer in model.exit_layers}
        owners = tensors["answer_of"] + first
        shards.append(States(at, tensors["top"], tensors["labels"], owners))
        if progress is not None:
            progress(first + len(own))
    return States.joined(shards)


@dataclass(frozen=True, slots=True)
class Split:
    """Boolean masks [answers]: who learns from an answer.

    Each stage learns from answers that no stage below it has seen: adapters, gates and predictors,
    second keys and floors, and last the thresholds and all figures.
    """

    adapter: Tensor
    gate: Tensor
    key: Tensor
    judge: Tensor


def split_answers(count: int, seed: int) -> Split:
    """Split ``count`` answers at random; each part has at least one of four or more."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    masks = []
    first = 0
    for share in (_GATE_SHARE, _KEY_SHARE, _JUDGE_SHARE):
        last = first + max(1, round(share * count))
        mask = torch.zeros(count, dtype=torch.bool)
        mask[order[first:last]] = True
        masks.append(mask)
        first = last
    gate, key, judge = masks
    return Split(~(gate | key | judge), gate, key, judge)


@dataclass(frozen=True, slots=True)
class _Run:
    """What every stage needs."""

    model: Transformer
    draft: Draft
    options: TrainOptions
    report: Report
    work: Work

    @property
    def eps(self) -> float:
        return self.model.config.rms_norm_eps


def train_exits(
    model: Transformer,
    states: States,
    *,
    fingerprint: str,
    data: dict[str, Any],
    options: TrainOptions,
    report: Report,
    maps: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    work: Work | None = None,
    start: Mapping[int, ExitHead] | None = None,
) -> ExitFile:
    """Train a head for each of the model's exit layers and set its keys and threshold.

    ``maps`` are the K,V maps by exit layer (see fit_kv_maps), ``start`` heads whose adapters
    training starts from (as wide as ``options`` say). Finished parts are kept in ``work`` and taken
    from there.
    """
    split = split_answers(int(states.answer_of.max()) + 1, options.seed)

    def part(mask: Tensor) -> States:
        return states.where(mask[states.answer_of])

    for_adapter, for_gate = part(split.adapter), part(split.gate)
    config = model.config
    vocab = draft_vocab(for_adapter.labels, config.eos_token_ids, config.vocab_size, options.vocab)
    run = _Run(model, Draft(model, vocab), options, report, work or Work())
    heads, curves = [], {}
    for layer in model.exit_layers:
        first = (start or {}).get(layer) or new_head(layer, model, options)
        head, curves[str(layer)] = _adapter(run, first, for_adapter, for_gate)
        heads.append(head)
    heads = _gates(run, heads, for_gate)
    heads = _keys(run, heads, part(split.key))
    if maps:
        heads = [replace(h, kv_map=maps[h.layer][0], kv_bias=maps[h.layer][1]) for h in heads]
    for_judge = part(split.judge)
    judged = _verdicts(run, heads, for_judge)
    heads = [
        replace(head, threshold=_threshold(own, options))
        for head, own in zip(heads, judged, strict=True)
    ]
    metrics = judge(heads, judged, config.num_layers)
    metrics |= {"judged_tokens": len(for_judge.labels), "curves": curves}
    data = data | {"train_tokens": len(for_adapter.labels), "gate_tokens": len(for_gate.labels)}
    return ExitFile(fingerprint, tuple(heads), metrics, data, vocab)


def _adapter(
    run: _Run, head: ExitHead, states: States, held_out: States
) -> tuple[ExitHead, list[dict[str, Any]]]:
    """The head with its adapter trained, and the curve over the epochs."""

    def make() -> Part:
        curve = train_adapter(
            head, run.model, states, run.options, run.report, (held_out, run.draft)
        )
        return {name: getattr(head, name) for name in ADAPTER}, {"curve": curve}

    tensors, values = run.work.part(f"adapter-{head.layer}", make)
    return _with_tensors(head, tensors), values["curve"]


def _gates(run: _Run, heads: Sequence[ExitHead], states: States) -> list[ExitHead]:
    """Heads with gates and predictors trained; every adapter is needed for the preference."""
    seen = predict(heads, states, run.draft)
    targets = _targets(run, heads, seen, states)
    return [_gate(run, *args, states) for args in zip(heads, targets, seen, strict=True)]


def _gate(run: _Run, head: ExitHead, target: Tensor, seen: Predictions, states: States) -> ExitHead:
    def make() -> Part:
        train_gate(head, target, states, run.options, run.report, run.eps)
        fitted = fit_predictor(head, seen.features, seen.agrees, run.options, run.report)
        return {name: getattr(fitted, name) for name in (*GATE, *PREDICTOR)}, {}

    return _with_tensors(head, run.work.part(f"gate-{head.layer}", make)[0])


def _targets(
    run: _Run, heads: Sequence[ExitHead], seen: Sequence[Predictions], states: States
) -> list[Tensor]:
    options, layers = run.options, run.model.config.num_layers
    if options.objective is Objective.AGREEMENT:
        return [own.agrees.float() for own in seen]
    log_probs = torch.stack([*(own.log_prob for own in seen), full_log_prob(run.model, states)])
    depths = torch.tensor([*(head.layer for head in heads), layers]) / layers
    weight, cost = options.preference_lambda, options.preference_beta
    return list(preference_targets(log_probs, depths, weight=weight, cost=cost))


def _keys(run: _Run, heads: Sequence[ExitHead], states: States) -> list[ExitHead]:
    """Heads with second key and floor."""
    fused = []
    for head, own in zip(heads, predict(heads, states, run.draft), strict=True):
        gate = exit_scores(head, states.at[head.layer], run.eps)
        keyed = replace(head, fuse=fit_fuse(gate, own.best, own.agrees))
        floor = floor_for(gate, two_key_scores(keyed, gate, own.best))
        fused.append(replace(keyed, floor=floor))
    return fused


@dataclass(frozen=True, slots=True)
class Judged:
    """One exit on n unseen positions: scores [n] of both keys, and which tokens are right [n]."""

    second: Tensor
    gate: Tensor
    right: Tensor


def _verdicts(run: _Run, heads: Sequence[ExitHead], states: States) -> list[Judged]:
    judged = []
    for head, own in zip(heads, predict(heads, states, run.draft), strict=True):
        gate = exit_scores(head, states.at[head.layer], run.eps)
        judged.append(Judged(two_key_scores(head, gate, own.best), gate, own.agrees))
    return judged


def _threshold(judged: Judged, options: TrainOptions) -> float:
    if options.threshold is not None:
        return options.threshold
    return threshold_for(judged.second, judged.right, options.precision)[0]


def _with_tensors(head: ExitHead, tensors: Mapping[str, Tensor]) -> ExitHead:
    """``head`` with tensors as an exit file would give them back, so that figures are of those."""
    rounded: dict[str, Any] = {
        name: tensor.detach().half().float().to(head.scale.device)
        for name, tensor in tensors.items()
    }
    known = {field.name for field in fields(ExitHead)}
    assert known.issuperset(rounded), "parts are named after the head's fields"
    return replace(head, **rounded)


def judge(heads: Sequence[ExitHead], judged: Sequence[Judged], num_layers: int) -> dict[str, Any]:
    """Agreement and layers skipped when tokens leave at the first exit whose second key fires.

    Teacher-forced with exact K,V: the K,V of skipped layers cost more on top, which serving
    measures. ``by_gate`` and ``by_second_key`` are the shares of tokens that may leave at an exit
    when sorted by that key alone, while so many of them are right.
    """
    count = len(judged[0].right)
    inside = torch.ones(count, dtype=torch.bool)
    wrong = skipped = 0
    exits: dict[str, Any] = {}
    for head, own in zip(heads, judged, strict=True):
        leaves = inside & (own.second >= head.threshold)
        inside &= ~leaves
        wrong += int((leaves & ~own.right).sum())
        skipped += int(leaves.sum()) * (num_layers - head.layer)
        exits[str(head.layer)] = {
            "agreement_of_all": round(float(own.right.double().mean()), 4),
            "leaves": round(float(leaves.double().mean()), 4),
            "by_second_key": _shares(own.second, own.right),
            "by_gate": _shares(own.gate, own.right),
        }
    return {
        "exits": exits,
        "agreement": round(1 - wrong / count, 4),
        "layers_skipped": round(skipped / (count * num_layers), 4),
    }


def _shares(scores: Tensor, right: Tensor) -> dict[str, float]:
    return {
        f"share_right_at_{precision}": round(threshold_for(scores, right, precision)[1], 4)
        for precision in (0.98, 0.95)
    }


class PlotError(ModelError):
    """Pictures cannot be drawn here."""


def check_plot() -> None:
    """Raise PlotError if matplotlib is missing; to be called before hours of training."""
    try:
        import matplotlib  # noqa: F401, ICN001, PLC0415 (an extra; most commands do not need it)
    except ImportError as error:
        raise PlotError(
            "a plot needs matplotlib, which is not installed: pip install 'offramp[train]'"
        ) from error


def plot_curves(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw agreement and loss over the epochs as a PNG, one line per exit.

    ``curves`` holds, by exit layer, rows of ``epoch``, ``agreement`` (share) and ``loss`` (nats).
    """

    def lines(name: str, factor: float) -> Lines:
        return {
            f"exit after layer {layer}": [(row["epoch"], factor * row[name]) for row in rows]
            for layer, rows in curves.items()
        }

    panels = {
        "agreement with full depth (% of tokens)": lines("agreement", 100),
        "distillation loss (nats per token)": lines("loss", 1),
    }
    _plot(path, "Exit adapters on held-out answers", panels)


def plot_draft(path: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """Draw acceptance of each guess and the loss over the steps as a PNG.

    ``curve`` holds rows of ``step``, ``acceptance`` (shares by guess) and ``loss`` (nats).
    """
    guesses = range(len(curve[-1]["acceptance"]))
    panels = {
        "accepted, if those before are (% of guesses)": {
            f"guess {index + 1}": [(row["step"], 100 * row["acceptance"][index]) for row in curve]
            for index in guesses
        },
        "cross-entropy of first guesses (nats)": {
            "loss": [(row["step"], row["loss"]) for row in curve]
        },
    }
    _plot(path, "Draft head on held-out answers", panels, "steps of training")


Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Points of each line, by its label."""


def _plot(
    path: Path, title: str, panels: Mapping[str, Lines], along: str = "epochs of training"
) -> None:
    """Draw panels with lines side by side, by the labels of their axes."""
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    columns = figure.subplots(1, len(panels))
    for axes, (label, lines) in zip(columns, panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set_xlabel(along)
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The format is named, so the file may be called anything; no date keeps equal runs equal.
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
