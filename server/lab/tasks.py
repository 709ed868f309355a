"""Tasks with a right answer, to see whether the text still says it when tokens leave early."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from offramp.server.lab.options import LabError

TOPICS = ("world", "sports", "business", "sci/tech")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FORMAT = re.compile(r"answer format:\s*(\S+)", re.IGNORECASE)
_TOPIC = re.compile(r"\b(world|sports?|business|sci(?:ence)?|tech(?:nology)?)\b", re.IGNORECASE)
_TOPIC_OF = {"w": "world", "b": "business", "t": "sci/tech"}


@dataclass(frozen=True, slots=True)
class Item:
    """A question and ``gold``, the answer that is right, as `Task.said` would read it."""

    prompt: str
    gold: str


@dataclass(frozen=True, slots=True)
class Task:
    """How a kind of file is read, and how an answer to one of its items is.

    ``said`` takes the item and the answer's text and returns what it amounts to, "" if nothing.
    """

    read: Callable[[Path], list[Item]]
    said: Callable[[Item, str], str]

    def right(self, item: Item, text: str) -> bool:
        """Whether ``text`` gives the item's right answer."""
        return self.said(item, text) == item.gold


def load_task(name: str, path: Path, limit: int | None, seed: int) -> list[Item]:
    """Items of a task file in an order drawn by ``seed``, at most ``limit``; raises LabError."""
    if name not in TASKS:
        raise LabError(f"unknown task {name}; known are {', '.join(TASKS)}")
    try:
        items = TASKS[name].read(path)
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise LabError(f"{path} is not a file of task {name}: {error}") from error
    if not items:
        raise LabError(f"{path} is empty")
    random.Random(seed).shuffle(items)  # noqa: S311 (an order, not a secret)
    return items[:limit]


def _gsm8k(path: Path) -> list[Item]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [Item(row["question"], _number(row["answer"].split("####")[1])) for row in rows]


def _number(text: str) -> str:
    """The last number of a text, written one way."""
    found = _NUMBER.findall(text)
    return f"{float(found[-1].replace(',', '')):g}" if found else ""


def _choices(path: Path) -> list[Item]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [Item(row["instruction"], row["answer"].lower()) for row in rows]


def _choice(item: Item, text: str) -> str:
    """The first of the words the question's "Answer format" allows, spaces inside ignored."""
    form = _FORMAT.search(item.prompt)
    words = form[1].lower().split("/") if form else []
    squeezed = re.sub(r"\s+(?=\d)", "", text.lower())
    places = [(squeezed.find(word), word) for word in words if word in squeezed]
    return min(places)[1] if places else ""


def _ag_news(path: Path) -> list[Item]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    return [Item(_news_prompt(row[1], row[2]), TOPICS[int(row[0]) - 1]) for row in rows]


def _news_prompt(title: str, description: str) -> str:
    return (
        "What is this news about: World, Sports, Business or Sci/Tech? Answer with that word only."
        f"\n\n{title}\n{description}"
    )


def _topic(text: str) -> str:
    """The first topic a text names."""
    found = _TOPIC.search(text)
    if not found:
        return ""
    word = found[1].lower()
    return "sports" if word.startswith("sport") else _TOPIC_OF.get(word[0], "sci/tech")


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "gsm8k": Task(_gsm8k, lambda _item, text: _number(text)),
        "arc": Task(_choices, _choice),
        "ag_news": Task(_ag_news, lambda _item, text: _topic(text)),
    }
)
