"""What a draft head is trained on: states along the model's own answers, and batches of them."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from offramp.kernels.decoder import Taps, slots_of
from offramp.models.exits.training.data import Answer, batches, lay_out
from offramp.models.exits.training.pipeline import Part, Work
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.kv_cache import row_buffer
from offramp.models.transformer import Transformer

_SHARD = 256
_COLLECT_TOKENS = 4096


class DraftFeatures(Protocol):
    """Answers of two tokens or more, with the states along them."""

    answers: Sequence[Answer]

    def states(self, group: Sequence[int]) -> Tensor:
        """States [N, F, d] fp16 of the answers with these indices, one after another.

        Of all positions of prompt and answer but the answer's last token's.
        """
        ...

    def select(self, indices: Sequence[int]) -> DraftFeatures:
        """Those of some of the answers."""
        ...


class StoredFeatures:
    """States in files until they are asked for.

    ``places`` says of each answer in which file its states are, and where there they begin.
    """

    def __init__(self, answers: Sequence[Answer], places: Sequence[tuple[Any, int]]) -> None:
        self.answers = answers
        self._places = places

    def states(self, group: Sequence[int]) -> Tensor:
        """See DraftFeatures."""
        return torch.cat([self._of(index) for index in group])

    def select(self, indices: Sequence[int]) -> StoredFeatures:
        """See DraftFeatures."""
        return StoredFeatures(
            [self.answers[index] for index in indices], [self._places[index] for index in indices]
        )

    def _of(self, index: int) -> Tensor:
        file, start = self._places[index]
        states: Tensor = file.get_slice("states")[start : start + _length(self.answers[index])]
        return states


class ComputedFeatures:
    """States made by ``model`` when they are first asked for, and kept on its device.

    At most half of the memory that is free there holds them; the rest is made again each time.
    """

    def __init__(self, model: DenseModel, answers: Sequence[Answer], layers: Sequence[int]) -> None:
        self.answers = answers
        self._model = model
        self._layers = layers
        self._kept: dict[int, Tensor] = {}
        self._room = _free_memory(model.embed.device) // 2

    def states(self, group: Sequence[int]) -> Tensor:
        """See DraftFeatures."""
        missing = [index for index in group if index not in self._kept]
        made = dict(zip(missing, self._made(missing), strict=True))
        for index, states in made.items():
            size = states.numel() * states.element_size()
            if size <= self._room:
                # A copy: the batch that it is part of goes.
                self._kept[index] = states.clone()
                self._room -= size
        return torch.cat([made[i] if i in made else self._kept[i] for i in group])

    def select(self, indices: Sequence[int]) -> ComputedFeatures:
        """See DraftFeatures."""
        answers = [self.answers[index] for index in indices]
        return ComputedFeatures(self._model, answers, self._layers)

    def _made(self, indices: Sequence[int]) -> list[Tensor]:
        own = [self.answers[index] for index in indices]
        states = _states(self._model, own, self._layers) if own else ()
        return [row[: _length(item)] for row, item in zip(states, own, strict=True)]


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def collect_features(
    model: DenseModel | Transformer,
    answers: Sequence[Answer],
    layers: Sequence[int],
    work: Work,
    progress: Callable[[int], None],
) -> DraftFeatures:
    """States after ``layers`` at every position of prompts and answers, teacher-forced.

    On a CPU they may be those of the model as it is served, and ``work`` keeps them, which it needs
    a folder for: 2 bytes * d * layers a position, in shards of 256 answers. ``progress`` is called
    with the number of answers done.
    """
    if isinstance(model, DenseModel) and model.embed.device.type != "cpu":
        return ComputedFeatures(model, answers, layers)
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
    return StoredFeatures(answers, places)


def _shard(
    model: DenseModel | Transformer, answers: Sequence[Answer], layers: Sequence[int]
) -> Part:
    found: dict[int, Tensor] = {}
    if isinstance(model, Transformer):
        for group in batches(answers, range(len(answers))):
            own = [answers[index] for index in group]
            found |= zip(group, _served_states(model, own, layers), strict=True)
        return {"states": torch.cat([found[index] for index in range(len(answers))])}, {}
    order = sorted(range(len(answers)), key=lambda index: _length(answers[index]))
    while order:
        count = max(1, _COLLECT_TOKENS // _length(answers[order[-1]]))
        batch, order = order[-count:], order[:-count]
        states = _states(model, [answers[index] for index in batch], layers).cpu()
        for row, index in enumerate(batch):
            found[index] = states[row, : _length(answers[index])].clone()
    return {"states": torch.cat([found[index] for index in range(len(answers))])}, {}


@torch.no_grad()
def _states(model: DenseModel, answers: Sequence[Answer], layers: Sequence[int]) -> Tensor:
    """States [B, T, F, d] fp16, padded on the right."""
    device = model.embed.device
    ids = torch.zeros(len(answers), max(map(_length, answers)), dtype=torch.long, device="cpu")
    for row, item in enumerate(answers):
        text = torch.tensor((*item.prompt, *item.answer[:-1]), device="cpu")
        ids[row, : len(text)] = text
    with torch.autocast(device.type, torch.bfloat16):
        seen = model(ids.to(device), layers)
    return torch.stack([seen.at[layer] for layer in layers], dim=2).half()


@torch.inference_mode()
def _served_states(
    model: Transformer, answers: Sequence[Answer], layers: Sequence[int]
) -> list[Tensor]:
    """States [N, F, d] fp16 of each answer."""
    layout, config = lay_out(model, list(enumerate(answers))), model.config
    count = len(layout.hidden)
    states = row_buffer((count, len(layers), config.hidden_size), torch.float32, model.device)
    taps = Taps(states, array("q", range(count)), slots_of(layers, config.num_layers))
    model.run((0, len(model.segments) - 1), layout.hidden, layout.at, layout.cache, taps)
    return [part.half() for part in states.split([_length(item) for item in answers])]


def _length(item: Answer) -> int:
    return len(item.prompt) + len(item.answer) - 1


@dataclass(frozen=True, slots=True)
class Guesses:
    """The n guesses of one step: the first, second, ... of every chain long enough.

    A chain begins at each entry whose guess an answer's token can verify. ``rows`` [n] are the
    entries that the guesses are made at, ``chains`` [n] their chains' places among [B, C], and
    ``after`` [n] the guesses of the step before that they follow (none in the first step).
    """

    rows: Tensor
    chains: Tensor
    after: Tensor


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """B texts one after another: ``ids``, the tokens ``following`` and ``positions`` [N].

    ``states`` [N, F, d] are the stack's there, ``starts`` [B] the entries where texts begin.
    ``places`` [N] are the entries' places among [B, T], T being the ``longest`` text. At most
    ``most_chains`` (C) begin in a text, behind its first ``before`` [B] entries.
    """

    ids: Tensor
    following: Tensor
    positions: Tensor
    states: Tensor
    starts: Tensor
    places: Tensor
    longest: int
    before: Tensor
    most_chains: int
    steps: list[Guesses]


def make_batch(
    features: DraftFeatures, group: Sequence[int], guesses: int, device: torch.device
) -> DraftBatch:
    """The answers with these indices, and ``guesses`` from each of their positions."""
    items = [features.answers[index] for index in group]
    texts = [torch.tensor((*item.prompt, *item.answer), device="cpu") for item in items]
    sizes = torch.tensor([len(text) - 1 for text in texts], device="cpu")
    # The answer's first token is made by the prompt's last position; guesses begin behind it.
    before = torch.tensor([len(item.prompt) for item in items], device="cpu")
    counts, longest = sizes - before, int(sizes.max())
    most = int(counts.max())
    starts = sizes.cumsum(0) - sizes
    # All chains [B, C], of which the first ``counts`` of a text are there in the first step.
    chain = torch.arange(most, device="cpu")
    steps: list[Guesses] = []
    earlier = torch.zeros(len(items), most, dtype=torch.long, device="cpu")
    for step in range(guesses):
        alive = chain < (counts - step).unsqueeze(1)
        rows = (starts + before + step).unsqueeze(1) + chain
        places = torch.arange(alive.numel(), device="cpu").view(alive.shape)
        steps.append(Guesses(*(part[alive].to(device) for part in (rows, places, earlier))))
        earlier = (alive.flatten().cumsum(0) - 1).view(alive.shape)
    positions = torch.cat([torch.arange(size, device="cpu") for size in sizes.tolist()])
    text_of = torch.arange(len(items), device="cpu").repeat_interleave(sizes)
    columns = (
        torch.cat([text[:-1] for text in texts]),
        torch.cat([text[1:] for text in texts]),
        positions,
        starts,
        text_of * longest + positions,
        before,
    )
    ids, following, positions, starts, entries, before = (part.to(device) for part in columns)
    states = features.states(group).to(device)
    return DraftBatch(
        ids, following, positions, states, starts, entries, longest, before, most, steps
    )
