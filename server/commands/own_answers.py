"""What all trainings start from: the model, and its own answers as they are read or made."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from offramp.models.config import ModelConfig, Weights
from offramp.models.errors import ModelError
from offramp.models.exits.training.data import (
    Answer,
    read_answers,
    write_answers,
)
from offramp.models.exits.training.pipeline import Work
from offramp.models.exits.training.train import Report
from offramp.server.progress import Show

# Fewer leave nothing to judge on once the rest is split between adapters, gates and keys.
_FEWEST_ANSWERS = 50


class TrainingError(ModelError):
    """The training cannot be done as asked."""


@dataclass(frozen=True, slots=True)
class Job:
    """One call of the command; ``weights`` are those of the model as it was."""

    args: argparse.Namespace
    folder: Path
    config: ModelConfig
    weights: Mapping[str, Tensor]
    work: Work
    show: Show

    def bar(self, name: str, total: int) -> Callable[[int], None]:
        """Progress of one thing; to be called with how much is done."""
        return lambda done: self.show(name, done, total, "")


def check_out(path: Path) -> None:
    """Better now than after hours of training."""
    if path.is_dir():
        raise TrainingError(f"--out {path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise TrainingError(f"--out {path}: the folder cannot be written")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error


def own_answers(job: Job, weights: Weights = Weights.AUTO) -> list[Answer]:
    """The answers to train on, or made by an engine with ``weights``.

    Raises TrainingError if they are too few.
    """
    args = job.args
    if args.answers:
        answers = read_answers(args.answers, job.config)
    else:
        # An engine, and its configuration, where the answers are not there yet.
        from offramp.server.commands.generate_answers import generate  # noqa: PLC0415

        answers = generate(job, weights)
    if len(answers) < _FEWEST_ANSWERS:
        raise TrainingError(f"{len(answers)} answers; at least {_FEWEST_ANSWERS} are needed")
    if args.save_answers is not None:
        write_answers(args.save_answers, answers)
    return answers


def reporter(show: Show) -> Report:
    """Shows each thing that is trained, with its loss."""
    return lambda name, done, total, loss: show(name, done, total, f"loss {loss:.3f}")
