"""Run known text through the stack and keep the hidden states at the exit points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.rows import RowTable, Span
from offramp.models.exits.training.checkpoints import Part, Work
from offramp.models.kv_cache import KVCache
from offramp.models.transformer import Transformer

_BATCH_TOKENS = 1024
_BLOCK = 32
_SHARD = 256


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and what the model answered, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class States:
    """States of n answer positions.

    ``at[layer]`` [n, d] fp16 after that layer; ``top`` [n, d] fp16 the full-depth state after the
    final norm; ``labels`` [n] the full-depth model's choice; ``answer_of`` [n] which answer a
    position belongs to.
    """

    at: dict[int, Tensor]
    top: Tensor
    labels: Tensor
    answer_of: Tensor

    def where(self, keep: Tensor) -> States:
        """The positions selected by a boolean mask [n]."""
        picked = {layer: states[keep] for layer, states in self.at.items()}
        return States(picked, self.top[keep], self.labels[keep], self.answer_of[keep])

    def sample(self, count: int) -> States:
        """At most ``count`` positions, evenly spread."""
        size = len(self.labels)
        keep = torch.zeros(size, dtype=torch.bool)
        keep[torch.linspace(0, size - 1, min(count, size)).round().long()] = True
        return self.where(keep)

    @staticmethod
    def joined(parts: Sequence[States]) -> States:
        """The positions of all ``parts``, which have the same exit layers."""
        at = {layer: torch.cat([part.at[layer] for part in parts]) for layer in parts[0].at}
        return States(
            at,
            torch.cat([part.top for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.answer_of for part in parts]),
        )


def collect(
    model: Transformer, answers: Sequence[Answer], progress: Callable[[int], None] | None = None
) -> States:
    """States at the model's exit layers for every position that makes an answer token.

    ``progress`` is called with the number of answers done. Teacher-forced at full depth, so K,V are
    exact. Kept on the CPU: 2 bytes * d * (exit layers + 1) a position.
    """
    at: dict[int, list[Tensor]] = {layer: [] for layer in model.exit_layers}
    top: list[Tensor] = []
    labels: list[Tensor] = []
    owners: list[Tensor] = []
    order = sorted(range(len(answers)), key=lambda i: len(answers[i].prompt))
    done = 0
    for batch in batches(answers, order):
        exits, normed, owner = _forward(model, [(i, answers[i]) for i in batch])
        for layer, states in exits.items():
            at[layer].append(states.half().cpu())
        top.append(normed.half().cpu())
        choices = [part.argmax(-1).cpu() for part in map(model.logits, normed.split(256))]
        labels.append(torch.cat(choices))
        owners.append(owner)
        done += len(batch)
        if progress is not None:
            progress(done)
    joined = {layer: torch.cat(states) for layer, states in at.items()}
    return States(joined, torch.cat(top), torch.cat(labels), torch.cat(owners))


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


def batches(answers: Sequence[Answer], order: Sequence[int]) -> list[list[int]]:
    """Indices in ``order``, cut into batches of about a thousand tokens."""
    cut: list[list[int]] = [[]]
    tokens = 0
    for index in order:
        size = len(answers[index].prompt) + len(answers[index].answer)
        if cut[-1] and tokens + size > _BATCH_TOKENS:
            cut.append([])
            tokens = 0
        cut[-1].append(index)
        tokens += size
    return cut


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch laid out for a forward pass.

    ``hidden`` [T, d] embeddings of all tokens; ``rows`` [n] those that make answer tokens,
    ``owner`` [n] the answers they belong to.
    """

    hidden: Tensor
    at: RowTable
    cache: KVCache
    rows: Tensor
    owner: Tensor


def lay_out(model: Transformer, batch: Sequence[tuple[int, Answer]]) -> Layout:
    """Prompts and answers of a batch one after another, with pages of their own."""
    spans: list[Span] = []
    ids: list[int] = []
    keep: list[int] = []
    owner: list[int] = []
    blocks = 0
    for index, item in batch:
        tokens = (*item.prompt, *item.answer[:-1])
        size = -(-len(tokens) // _BLOCK)
        spans.append(Span(range(len(tokens)), range(blocks, blocks + size)))
        blocks += size
        keep += range(len(ids) + len(item.prompt) - 1, len(ids) + len(tokens))
        owner += [index] * len(item.answer)
        ids += tokens
    cache = KVCache(model.config, blocks, _BLOCK, model.dtype, model.device)
    at = RowTable.of(spans, _BLOCK, model.rotary, model.device)
    hidden = model.embed(torch.tensor(ids))
    return Layout(hidden, at, cache, torch.tensor(keep), torch.tensor(owner))


@torch.inference_mode()
def _forward(
    model: Transformer, batch: list[tuple[int, Answer]]
) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """Exit states, normalised top states and owners of one batch's answer positions."""
    layout = lay_out(model, batch)
    hidden = layout.hidden
    exits: dict[int, Tensor] = {}
    for segment in model.segments:
        hidden = segment(hidden, layout.at, layout.cache)
        end = segment.first + len(segment)
        if end in model.exit_layers:
            exits[end] = hidden[layout.rows]
    return exits, model.normed(hidden[layout.rows]), layout.owner
