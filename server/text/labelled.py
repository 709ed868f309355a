"""Inputs with the answers to a question about each, from a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.server.text.prompts import PromptFileError


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Inputs, and for each the index of its answer (None: the file has no answers)."""

    texts: list[str]
    answers: list[int] | None


def read_labelled(
    path: Path, fields: Sequence[str], label: str | None, values: Sequence[str]
) -> LabelledTexts:
    """The text of ``fields``, joined, and the index among ``values`` of the field ``label``.

    Files are JSON lines, a JSON list of objects, CSV or TSV with a header or without one; columns
    are also known by their numbers from 1 on. Raises PromptFileError.
    """
    rows = _rows(path)
    texts: list[str] = []
    answers: list[int] = []
    places = {value: index for index, value in enumerate(values)}
    for number, row in enumerate(rows, start=1):
        try:
            texts.append(". ".join(str(row[field]).strip() for field in fields))
            if label is not None:
                answers.append(places[str(row[label]).strip()])
        except KeyError as error:
            raise PromptFileError(
                f"{path}, row {number}: no field or answer {error}; the fields are "
                f"{', '.join(row)}; the answers {', '.join(values)}"
            ) from error
    return LabelledTexts(texts, answers if label is not None else None)


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            found: Any = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            return _table(io.StringIO(text), tabs=path.suffix == ".tsv")
    except OSError as error:
        raise PromptFileError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path}: not UTF-8 text") from error
    except csv.Error as error:
        raise PromptFileError(f"{path}: {error}") from error
    except ValueError as error:
        raise PromptFileError(f"{path}: not valid JSON ({error})") from error
    if not (isinstance(found, list) and all(isinstance(row, dict) for row in found)):
        raise PromptFileError(f"{path}: not a list of objects")
    return found


def _table(lines: Iterable[str], *, tabs: bool) -> list[dict[str, str]]:
    """Rows of CSV or TSV; the first one counts as a header where its cells are words."""
    if tabs:
        # Quotes in these are text.
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    else:
        rows = list(csv.reader(lines))
    if not rows:
        return []
    numbers = [str(column) for column in range(1, len(rows[0]) + 1)]
    header = all(cell.replace("_", "").isalpha() for cell in rows[0])
    body = rows[1:] if header else rows
    names = rows[0] if header else numbers
    return [dict(zip((*numbers, *names), (*row, *row), strict=False)) for row in body]
