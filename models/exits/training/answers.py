"""Answers on disk: one JSON object a line, with the token ids of ``prompt`` and ``answer``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.exits.training.hidden_states import Answer


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
