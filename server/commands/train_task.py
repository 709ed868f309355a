"""What ``offramp exits train-task`` does: rows with a question, states, heads, their thresholds."""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from offramp.models.exits.decision_heads import (
    SUFFIX,
    DecisionFile,
    DecisionTask,
    load_decision_heads,
    shipped_decision_heads,
)
from offramp.models.exits.training.decisions import (
    Judged,
    PromptStates,
    calibrate,
    collect_states,
    fit_task,
    judge_task,
)
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import StoredWeights, fingerprint
from offramp.models.loading.sources import resolve
from offramp.models.runner import Runner
from offramp.server.commands.own_answers import TrainingError, check_out
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine, runner_of
from offramp.server.text.decisions import (
    Option,
    Question,
    QuestionKind,
    encode_questions,
    predicate,
    score,
)
from offramp.server.text.tokenizer import Tokenizer

# Rows kept aside: one part to find thresholds with, one to report on.
_ASIDE = 0.2
_FEWEST = 200
_NO_INPUT = "N/A"


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs, and for each the index of its answer (None: the model's own counts)."""

    texts: list[str]
    answers: list[int] | None


def run(args: argparse.Namespace) -> int:
    """Train as ``args`` say and print the metrics as one line of JSON."""
    if not args.out.name.endswith(SUFFIX):
        raise TrainingError(f"--out {args.out}: the name of decision heads ends in {SUFFIX}")
    check_out(args.out)
    question = _question(args)
    rows = _read(args)
    if len(rows.texts) < _FEWEST:
        raise TrainingError(f"{len(rows.texts)} rows; at least {_FEWEST} are needed")
    folder = resolve(args.model)
    config = config_from_hf(folder)
    layers = args.layers or default_layers(config.num_layers)
    if layers[-1] >= config.num_layers:
        raise TrainingError(f"--layers: this model has {config.num_layers} layers")
    own = fingerprint(StoredWeights(folder, config, dtype=torch.float32))
    before = args.out if args.out.exists() else shipped_decision_heads(own)
    file = DecisionFile(own)
    if before is not None:
        file = load_decision_heads(before, fingerprint=own, config=config)
    engine = build_engine(
        EngineConfig(
            model=args.model, exits="none", draft_head="none", decision_heads="none", max_num_seqs=1
        ),
        folder,
        model_name=args.model,
    )
    tokenizer = Tokenizer.load(folder)
    with Progress(console=Console(stderr=True)) as bars:
        task = _train(args, question, rows, runner_of(engine), tokenizer, layers, bars)
    replace(file, tasks={**file.tasks, args.name: task}).save(args.out)
    sys.stdout.write(json.dumps(task.metrics) + "\n")
    return 0


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Where answers may leave: close together below, where most of them do."""
    fine, coarse = max(1, num_layers // 15), max(1, num_layers // 10)
    low = range(fine, 2 * num_layers // 5 + 1, fine)
    return (*low, *range(low[-1] + coarse, num_layers, coarse))


def _question(args: argparse.Namespace) -> Question:
    names = [name for name, _ in args.labels]
    if args.type == "predicate":
        if names != ["yes", "no"]:
            raise TrainingError("--labels of a predicate are yes=VALUE,no=VALUE")
        return predicate(args.instructions)
    if args.type == "score":
        return score(args.instructions, names)
    return Question(QuestionKind.CHOICE, args.instructions, tuple(map(Option, names)))


def _read(args: argparse.Namespace) -> Rows:
    """Rows of the file; raises TrainingError where a field or a label is missing."""
    values = {value: index for index, (_, value) in enumerate(args.labels)}
    texts: list[str] = []
    answers: list[int] = []
    for number, row in enumerate(_rows_of(args.data), start=1):
        try:
            texts.append(". ".join(str(row[name]).strip() for name in args.text))
            if args.label is not None:
                answers.append(values[str(row[args.label]).strip()])
        except KeyError as error:
            known = ", ".join(row)
            raise TrainingError(
                f"{args.data}, row {number}: no field or label {error}; fields: {known}; labels: "
                f"{', '.join(values)}"
            ) from error
    return Rows(texts, answers if args.label is not None else None)


def _rows_of(path: Path) -> list[Mapping[str, Any]]:
    """Rows by field: JSON lines, a JSON list, or CSV and TSV with a header or columns 1, 2, .."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if path.suffix == ".json":
            return list(json.loads(text))
    except ValueError as error:
        raise TrainingError(f"{path}: not valid JSON ({error})") from error
    lines = text.splitlines()
    if path.suffix == ".tsv":
        # Quotes in these are text.
        table = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    else:
        table = list(csv.reader(lines))
    numbers = [str(column) for column in range(1, len(table[0]) + 1)] if table else []
    named = [dict(zip(table[0], row, strict=False)) for row in table[1:]]
    counted = [dict(zip(numbers, row, strict=False)) for row in table]
    headed = [{**a, **b} for a, b in zip(named, counted[1:], strict=True)]
    return [*headed] or [*counted]


def _train(
    args: argparse.Namespace,
    question: Question,
    rows: Rows,
    runner: Runner,
    tokenizer: Tokenizer,
    layers: Sequence[int],
    bars: Progress,
) -> DecisionTask:
    labels = tuple(option.label for option in question.options)
    model, eps = runner.model, runner.model.config.rms_norm_eps
    ids = torch.tensor(_end(runner))
    prompts = [_prompt(tokenizer, text, question, int(ids)) for text in rows.texts]
    bar = bars.add_task("states", total=len(prompts))
    top = model.config.num_layers
    states = collect_states(
        model,
        runner.cache,
        prompts,
        (*layers, top),
        lambda done: bars.update(bar, completed=done),
    )
    own = _zero_shot(runner, tokenizer, question, states)
    truth = own if rows.answers is None else torch.tensor(rows.answers)
    learn, find, report = _split(len(prompts), args.seed)
    heads = fit_task(states.select(learn), truth[learn], len(labels), eps)
    known = None if rows.answers is None else truth
    judged = [
        judge_task(heads, states.select(part), eps, known if known is None else known[part])
        for part in (find, report)
    ]
    points = calibrate(*judged)
    metrics = _metrics(judged[1], points, own[report], truth[report])
    metrics |= {"data": args.data.name, "rows": len(prompts), "labelled": known is not None}
    heads = replace(heads, points=points)
    return DecisionTask(args.name, question.wording, labels, heads, metrics)


def _end(runner: Runner) -> int:
    return runner.model.config.eos_token_ids[0]


def _prompt(tokenizer: Tokenizer, text: str, question: Question, end: int) -> tuple[int, ...]:
    labels = tuple(option.label for option in question.options)
    message = {"role": "user", "content": text}
    return encode_questions(tokenizer, [message], [(question.wording, labels)], end)[0].prompt


def _zero_shot(
    runner: Runner, tokenizer: Tokenizer, question: Question, states: PromptStates
) -> Tensor:
    """The model's own answers [n] at full depth, told by their first tokens, bias removed."""
    labels = tuple(option.label for option in question.options)
    message = {"role": "user", "content": _NO_INPUT}
    asked = encode_questions(tokenizer, [message], [(question.wording, labels)], _end(runner))[0]
    none = collect_states(runner.model, runner.cache, [asked.prompt], states.layers, lambda _: None)
    first = asked.tree.reads[0].candidates
    if len(first) < len(labels):
        raise TrainingError("two labels begin with the same token; give answers that differ")
    candidates = runner.model.head_rows(torch.tensor(first)).float()
    return ((states.final - none.final) @ candidates.T).argmax(1)


def _split(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311
    aside = int(_ASIDE * count)
    parts = order[2 * aside :], order[:aside], order[aside : 2 * aside]
    return (torch.tensor(parts[0]), torch.tensor(parts[1]), torch.tensor(parts[2]))


def _metrics(judged: Judged, points: Sequence[Any], own: Tensor, truth: Tensor) -> dict[str, Any]:
    """What held-out rows show, by operating point."""

    def right(answers: Tensor) -> float:
        return round(float((answers == truth).float().mean()), 4)

    found = []
    for point in points:
        answers, _ = judged.leave(point.thresholds)
        found.append(
            {
                "quality": point.quality,
                "threshold": point.thresholds[0],
                "accuracy": right(answers),
                "agreement": round(point.agreement, 4),
                "mean_layer": round(point.mean_layer, 2),
            }
        )
    each = {str(layer): right(judged.answers[place]) for place, layer in enumerate(judged.layers)}
    return {
        "held_out": len(truth),
        "accuracy": {"zero_shot": right(own), "full_depth": right(judged.full), "layers": each},
        "points": found,
    }
