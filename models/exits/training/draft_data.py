"""What a draft head is trained on: states along the model's own answers, and batches of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from offramp.models.exits.training.data import Answer
from offramp.models.exits.training.pipeline import Part, Work
from offramp.models.exits.training.training_model import DenseModel

_SHARD = 256
_COLLECT_TOKENS = 4096


class DraftFeatures:
    """Answers of two tokens or more with the states along them, in files until they are asked for.

    ``places`` says of each answer in which file its states are, and where there they begin.
    """

    def __init__(self, answers: Sequence[Answer], places: Sequence[tuple[Any, int]]) -> None:
        self.answers = answers
        self._places = places

    def of(self, index: int) -> Tensor:
        """States [T, F, d] of all positions of an answer but its last token's."""
        file, start = self._places[index]
        states: Tensor = file.get_slice("states")[start : start + _length(self.answers[index])]
        return states

    def select(self, indices: Sequence[int]) -> DraftFeatures:
        """Those of some of the answers."""
        return DraftFeatures(
            [self.answers[index] for index in indices], [self._places[index] for index in indices]
        )


def collect_features(
    model: DenseModel,
    answers: Sequence[Answer],
    layers: Sequence[int],
    work: Work,
    progress: Callable[[int], None],
) -> DraftFeatures:
    """States after ``layers`` at every position of prompts and answers, teacher-forced.

    ``work`` keeps them, which it needs a folder for: 2 bytes * d * layers a position, in shards of
    256 answers. ``progress`` is called with the number of answers done.
    """
    places: list[tuple[Any, int]] = []
    for first in range(0, len(answers), _SHARD):
        own = answers[first : first + _SHARD]
        name = f"draft-states-{first // _SHARD:05d}"
        path = work.path(f"{name}.safetensors")
        assert path is not None, "features need a folder"
        if not path.exists():
            work.part(name, functools.partial(_shard, model, own, layers))
        file, start = safe_open(path, "pt"), 0
        for item in own:
            places.append((file, start))
            start += _length(item)
        progress(first + len(own))
    return DraftFeatures(answers, places)


@torch.inference_mode()
def _shard(model: DenseModel, answers: Sequence[Answer], layers: Sequence[int]) -> Part:
    found: dict[int, Tensor] = {}
    order = sorted(range(len(answers)), key=lambda index: _length(answers[index]))
    while order:
        longest = _length(answers[order[-1]])
        count = max(1, _COLLECT_TOKENS // longest)
        batch, order = order[-count:], order[:-count]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, index in enumerate(batch):
            text = (*answers[index].prompt, *answers[index].answer[:-1])
            ids[row, : len(text)] = torch.tensor(text)
        device = model.embed.device
        with torch.autocast(device.type, torch.bfloat16):
            seen = model(ids.to(device), layers)
        states = torch.stack([seen.at[layer] for layer in layers], dim=2).half().cpu()
        for row, index in enumerate(batch):
            found[index] = states[row, : _length(answers[index])].clone()
    return {"states": torch.cat([found[index] for index in range(len(answers))])}, {}


def _length(item: Answer) -> int:
    return len(item.prompt) + len(item.answer) - 1


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Texts one after another: ``ids``, the tokens ``following`` and ``positions`` [N].

    ``states`` [N, F, d] are the stack's there. ``spans`` lists of each text where it begins, its
    length, and the position of its first guess.
    """

    ids: Tensor
    following: Tensor
    positions: Tensor
    states: Tensor
    spans: list[tuple[int, int, int]]

    def rows(self, step: int) -> Tensor:
        """The entries that make the guesses of ``step`` (0: from the stack's states)."""
        return torch.cat(
            [
                torch.arange(start + min(first + step, size), start + size)
                for start, size, first in self.spans
            ]
        )


def make_batch(features: DraftFeatures, group: Sequence[int], device: torch.device) -> DraftBatch:
    """The answers with these indices, on ``device``."""
    ids: list[int] = []
    following: list[int] = []
    positions: list[int] = []
    spans = []
    for index in group:
        item = features.answers[index]
        text = (*item.prompt, *item.answer[:-1])
        # The answer's first token is made by the prompt's last position; guesses begin behind it.
        spans.append((len(ids), len(text), len(item.prompt)))
        ids += text
        following += (*text[1:], item.answer[-1])
        positions += range(len(text))
    states = torch.cat([features.of(index) for index in group])
    columns = [torch.tensor(each, device=device) for each in (ids, following, positions)]
    return DraftBatch(columns[0], columns[1], columns[2], states.to(device), spans)


def parts_of(batch: DraftBatch, step: int) -> list[tuple[int, int]]:
    """Where each text's guesses begin among all of ``step``, and how many they are."""
    parts, at = [], 0
    for _, size, first in batch.spans:
        count = max(0, size - first - step)
        parts.append((at, count))
        at += count
    return parts
