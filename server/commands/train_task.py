"""What ``offramp exits train-task`` does: rows with a question, states, heads, their thresholds."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.models.exits.decision_heads import (
    SUFFIX,
    DecisionFile,
    DecisionTask,
    load_decision_heads,
    shipped_decision_heads,
)
from offramp.models.exits.points import DecisionPoint
from offramp.models.exits.training.decisions import (
    Judged,
    PromptStates,
    calibrate,
    collect_states,
    fit_scale,
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
from offramp.server.progress import bar
from offramp.server.text.decisions import (
    EncodedQuestion,
    Question,
    QuestionKind,
    encode_questions,
    question,
)
from offramp.server.text.labelled import LabelledTexts, read_labelled
from offramp.server.text.tokenizer import Tokenizer

# Rows kept aside: one part to find thresholds with, one to report on.
_ASIDE = 0.2
_FEWEST = 200
_NO_INPUT = "N/A"


def run(args: argparse.Namespace) -> int:
    """Train as ``args`` say and print the metrics as one line of JSON."""
    if not args.out.name.endswith(SUFFIX):
        raise TrainingError(f"--out {args.out}: the name of decision heads ends in {SUFFIX}")
    check_out(args.out)
    asked = _question(args)
    rows = read_labelled(args.data, args.text, args.label, [value for _, value in args.labels])
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
    with bar("states") as progress:
        task = _train(args, asked, rows, runner_of(engine), tokenizer, layers, progress)
    replace(file, tasks={**file.tasks, args.name: task}).save(args.out)
    sys.stdout.write(json.dumps(task.metrics) + "\n")
    return 0


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Where answers may leave: close together below, where most of them do."""
    fine, coarse = max(1, num_layers // 15), max(1, num_layers // 10)
    low = range(fine, 2 * num_layers // 5 + 1, fine)
    return (*low, *range((low[-1] if low else 0) + coarse, num_layers, coarse))


def _question(args: argparse.Namespace) -> Question:
    names = [name for name, _ in args.labels]
    if args.type == "predicate" and names != ["yes", "no"]:
        raise TrainingError("--labels of a predicate are yes=VALUE,no=VALUE")
    return question(QuestionKind(args.type), args.instructions, names)


def _train(
    args: argparse.Namespace,
    asked: Question,
    rows: LabelledTexts,
    runner: Runner,
    tokenizer: Tokenizer,
    layers: Sequence[int],
    progress: Callable[[int, int], None],
) -> DecisionTask:
    labels = tuple(option.label for option in asked.options)
    model, eps = runner.model, runner.model.config.rms_norm_eps
    labelled = rows.answers is not None
    ends = model.config.eos_token_ids
    # Only labels that go on after another label need an end, and here none may.
    end = ends[0] if ends else model.config.vocab_size - 1
    empty = _encoded(tokenizer, _NO_INPUT, asked, end)
    told = len(empty.tree.reads[0].candidates) == len(labels) and not empty.tree.reads[0].path
    if not (labelled or told):
        raise TrainingError("two labels begin with the same token; give answers that differ")
    prompts = [_encoded(tokenizer, text, asked, end).prompt for text in rows.texts]
    most = len(model.rotary.angles[0])
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > most:
            raise TrainingError(
                f"row {number} has {len(prompt)} tokens with the question; the model's context is "
                f"{most}"
            )
    top = model.config.num_layers
    states = collect_states(
        model,
        runner.cache,
        prompts,
        (*layers, top),
        lambda done: progress(done, len(prompts)),
    )
    own_chances = _zero_shot(runner, empty, states) if told else None
    own = None if own_chances is None else own_chances.argmax(1)
    truth = own if rows.answers is None else torch.tensor(rows.answers)
    assert truth is not None
    learn, find, report = _split(len(prompts), args.seed)
    heads = fit_task(states.select(learn), truth[learn], len(labels), eps)
    judged = [
        judge_task(heads, states.select(part), eps, truth[part], labelled=labelled)
        for part in (find, report)
    ]
    points = calibrate(*judged)
    metrics = _metrics(judged[1], points, None if own is None else own[report], truth[report])
    metrics |= {"data": args.data.name, "rows": len(prompts)}
    heads = replace(heads, points=points)
    scale = 1.0
    if not labelled and own_chances is not None:
        scale = fit_scale(heads, states.select(find), eps, own_chances[find])
    return DecisionTask(args.name, asked.wording, labels, heads, labelled, scale, metrics)


def _encoded(tokenizer: Tokenizer, text: str, asked: Question, end: int) -> EncodedQuestion:
    labels = tuple(option.label for option in asked.options)
    message = {"role": "user", "content": text}
    return encode_questions(tokenizer, [message], [(asked.wording, labels)], end)[0]


def _zero_shot(runner: Runner, empty: EncodedQuestion, states: PromptStates) -> Tensor:
    """The model's own probabilities [n, answers] at full depth, of first tokens, bias removed.

    ``empty`` is the question without an input.
    """
    none = collect_states(runner.model, runner.cache, [empty.prompt], states.layers, lambda _: None)
    first = torch.tensor(empty.tree.reads[0].candidates)
    candidates = runner.model.head_rows(first).float()
    return ((states.final - none.final) @ candidates.T).softmax(1)


def _split(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    order = list(range(count))
    random.Random(seed).shuffle(order)  # noqa: S311
    aside = int(_ASIDE * count)
    parts = order[2 * aside :], order[:aside], order[aside : 2 * aside]
    return (torch.tensor(parts[0]), torch.tensor(parts[1]), torch.tensor(parts[2]))


def _metrics(
    judged: Judged, points: Sequence[DecisionPoint], own: Tensor | None, truth: Tensor
) -> dict[str, Any]:
    """What held-out rows show, by operating point; ``own`` [n] are the model's own answers."""

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
        "accuracy": {
            "zero_shot": None if own is None else right(own),
            "full_depth": right(judged.full),
            "layers": each,
        },
        "points": found,
    }
