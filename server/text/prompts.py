"""Prompts to measure with: from a file, or a built-in set of everyday questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FIELDS = ("prompt", "question", "instruction", "text")

BUILT_IN = (
    "Explain in three sentences why the sky is blue.",
    "Write a short, polite e-mail that moves tomorrow's meeting to Friday morning.",
    "List five things to check before a long bicycle tour.",
    "What is the difference between a list and a tuple in Python?",
    "Tell a bedtime story about a lighthouse that is afraid of the dark.",
    "How do vaccines teach the immune system to recognise a virus?",
    "Write a Python function that returns the median of a list of numbers.",
    "Give me a simple recipe for a vegetable soup for four people.",
    "Summarise the plot of Romeo and Juliet in a few sentences.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive?",
    "Name three advantages and three drawbacks of working from home.",
    "Translate into formal English: hey, can u send me the stuff by tonite?",
    "What should a first-time visitor see in Rome in two days?",
    "Describe how a binary search works, with a small example.",
    "Write a haiku about the first snow of the year.",
    "Why do cats purr?",
    "Explain compound interest to a ten-year-old.",
    "Draft a product description for a reusable water bottle that keeps drinks cold.",
    "How can I get better at remembering people's names?",
    "What are the main causes of the First World War?",
    "Write an SQL query that finds the three customers with the most orders.",
    "Suggest a weekly plan for somebody who wants to learn the guitar.",
    "Explain what a black hole is and how we know that they exist.",
    "Give tips for a good night's sleep.",
)


class PromptFileError(Exception):
    """The file holds no prompts this command can read."""


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: plain text, one a line, or JSON / JSON lines.

    JSON objects give their ``prompt``, ``question``, ``instruction`` (with ``input``), ``text`` or
    first of ``turns``. Raises PromptFileError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptFileError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path}: not UTF-8 text") from error
    lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if path.suffix == ".json":
        items = _decoded(text, str(path))
        if not isinstance(items, list):
            raise PromptFileError(f"{path} must hold a JSON list")
        prompts = [_prompt_of(item, str(path)) for item in items]
    elif path.suffix == ".jsonl":
        places = [(f"{path}, line {n}", line) for n, line in lines]
        prompts = [_prompt_of(_decoded(line, where), where) for where, line in places]
    else:
        prompts = [line for _, line in lines]
    if not prompts:
        raise PromptFileError(f"{path} is empty")
    return prompts


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PromptFileError(f"{where}: not valid JSON ({error})") from error


def _prompt_of(item: Any, where: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        if item.get("turns") and isinstance(item["turns"][0], str):
            return str(item["turns"][0])
        for name in _FIELDS:
            if isinstance(item.get(name), str):
                extra = item.get("input") or ""
                return f"{item[name]}\n\n{extra}".strip()
    raise PromptFileError(f"{where}: a row has none of: turns, {', '.join(_FIELDS)}")
