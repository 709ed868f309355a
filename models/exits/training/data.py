"""What exits are trained on: the model's own answers, and the hidden states along them.

Files of answers hold one JSON object a line, with the token ids of ``prompt`` and ``answer``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.rows import HostRows, Span
from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.kv_cache import KVCache
from offramp.models.transformer import Transformer

_BATCH_TOKENS = 1024
_BLOCK = 32
_LOGITS_ROWS = 256


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
        names = ("top", "labels", "answer_of")
        return States(at, *(torch.cat([getattr(part, name) for part in parts]) for name in names))


def collect(
    model: Transformer, answers: Sequence[Answer], progress: Callable[[int], None] | None = None
) -> States:
    """States at the model's exit layers for every position that makes an answer token.

    ``progress`` is called with the number of answers done. Teacher-forced at full depth, so K,V are
    exact. Kept on the CPU: 2 bytes * d * (exit layers + 1) a position.
    """
    parts: list[States] = []
    done = 0
    for batch in batches(
        answers, sorted(range(len(answers)), key=lambda i: len(answers[i].prompt))
    ):
        parts.append(_forward(model, [(i, answers[i]) for i in batch]))
        done += len(batch)
        if progress is not None:
            progress(done)
    return States.joined(parts)


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
    at: HostRows
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
    at = HostRows(spans, _BLOCK, model.rotary, model.device)
    hidden = model.embed(torch.tensor(ids, device=model.device))
    return Layout(hidden, at, cache, torch.tensor(keep), torch.tensor(owner))


@torch.inference_mode()
def _forward(model: Transformer, batch: list[tuple[int, Answer]]) -> States:
    layout = lay_out(model, batch)
    hidden = layout.hidden
    exits: dict[int, Tensor] = {}
    for segment in model.segments:
        hidden = segment(hidden, layout.at, layout.cache)
        end = segment.first + len(segment)
        if end in model.exit_layers:
            exits[end] = hidden[layout.rows].half().cpu()
    top = model.normed(hidden[layout.rows])
    choices = [part.argmax(-1).cpu() for part in map(model.logits, top.split(_LOGITS_ROWS))]
    return States(exits, top.half().cpu(), torch.cat(choices), layout.owner)


class AnswersError(ModelError):
    """A file of answers that cannot be trained on; the message names file and line."""


def read_answers(paths: Sequence[Path], config: ModelConfig) -> list[Answer]:
    """All answers of ``paths`` for the model of ``config``.

    Raises AnswersError for files that cannot be read or hold nothing, lines that are not JSON, and
    rows without prompt or answer, with ids outside the vocabulary or longer than the context.
    """
    return [answer for path in paths for answer in _read_file(path, config)]


def _read_file(path: Path, config: ModelConfig) -> Iterator[Answer]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise AnswersError(f"{path}: {reason}") from error
    if not any(line.strip() for line in lines):
        raise AnswersError(f"{path} is empty")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _answer(line, f"{path}, line {number}", config)


def _answer(line: str, where: str, config: ModelConfig) -> Answer:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise AnswersError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise AnswersError(f"{where}: must be an object with prompt and answer")
    prompt, answer = (_ids(row, name, where, config.vocab_size) for name in ("prompt", "answer"))
    if len(prompt) + len(answer) > config.max_position_embeddings:
        raise AnswersError(
            f"{where}: {len(prompt) + len(answer)} tokens; the model takes "
            f"{config.max_position_embeddings}"
        )
    return Answer(prompt, answer)


def _ids(row: dict[str, Any], name: str, where: str, vocab_size: int) -> tuple[int, ...]:
    ids = row.get(name)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise AnswersError(f"{where}: {name} must be a list of token ids")
    if not ids:
        raise AnswersError(f"{where}: {name} is empty")
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise AnswersError(
            f"{where}: token id {outside[0]} in {name} is outside the vocabulary of {vocab_size}"
        )
    return tuple(ids)


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write a file that `read_answers` reads."""
    rows = [{"prompt": item.prompt, "answer": item.answer} for item in answers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class AnswerLog:
    """Answers by number, appended as they finish; without a path they are only held."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.answers: dict[int, Answer] = {}
        if path is not None and path.exists():
            self._read(path)

    def add(self, number: int, answer: Answer) -> None:
        """Keep one finished answer."""
        self.answers[number] = answer
        if self._path is not None:
            row = {"index": number, "prompt": answer.prompt, "answer": answer.answer}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _read(self, path: Path) -> None:
        whole, newline, torn = path.read_text(encoding="utf-8").rpartition("\n")
        if torn:
            # The run ended in the middle of a line, which would run into the next one.
            path.write_text(whole + newline, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.answers[row["index"]] = Answer(tuple(row["prompt"]), tuple(row["answer"]))
            except (ValueError, KeyError, TypeError) as error:
                raise AnswersError(f"{path}, line {number}: damaged ({error!r})") from error
