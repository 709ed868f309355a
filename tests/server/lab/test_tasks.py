"""Tasks: files read, answers understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offramp.server.lab.options import LabError, table
from offramp.server.lab.tasks import TASKS, Item, load_task


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("So she makes 9 * 2 = $1,018 a day.", True),
        ("The answer is 1018.", True),
        ("1018.0", True),
        ("It is 1018, not 18", False),
        ("no idea", False),
        ("", False),
    ],
)
def test_the_last_number_counts(tmp_path: Path, text: str, right: bool) -> None:  # noqa: FBT001
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "9*2\n#### 1,018"}) + "\n")
    (item,) = load_task("gsm8k", path, None, 0)
    assert TASKS["gsm8k"].right(item, text) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("the correct answer is answer3", True),
        ("Answer 3: Planetary days", True),
        ("answer1, or rather answer3", False),
        ("three", False),
    ],
)
def test_the_first_choice_named_counts(tmp_path: Path, text: str, right: bool) -> None:  # noqa: FBT001
    path = tmp_path / "t.json"
    question = (
        "Which?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3"
    )
    path.write_text(json.dumps([{"instruction": question, "answer": "answer3"}]))
    (item,) = load_task("arc", path, None, 0)
    assert item.prompt == question
    assert TASKS["arc"].right(item, text) is right


def test_words_as_choices() -> None:
    item = Item("Is it?\n\nAnswer format: true/false", "false")
    assert TASKS["arc"].right(item, "The correct answer is False.")
    assert not TASKS["arc"].right(item, "true")
    assert not TASKS["arc"].right(Item("no format", "false"), "false")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Sci/Tech", True),
        ("science and technology", True),
        ("This is about technology.", True),
        ("Business, perhaps tech", False),
        ("Sports", False),
        ("worldwide", False),
        ("", False),
    ],
)
def test_the_first_topic_counts(tmp_path: Path, text: str, right: bool) -> None:  # noqa: FBT001
    path = tmp_path / "t.csv"
    path.write_text('"4","A, title","Text ""quoted"""\n')
    (item,) = load_task("ag_news", path, None, 0)
    assert item.prompt.endswith('A, title\nText "quoted"')
    assert TASKS["ag_news"].right(item, text) is right


def test_items_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("".join(f'"{i % 4 + 1}","{i}","x"\n' for i in range(40)))
    some = load_task("ag_news", path, 10, 1)
    assert len(some) == 10
    assert some == load_task("ag_news", path, 10, 1)
    assert some != load_task("ag_news", path, 10, 2)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with pytest.raises(LabError, match="No such file"):
        load_task("gsm8k", path, None, 0)
    path.write_text("nonsense\n")
    for name in TASKS:
        with pytest.raises(LabError, match=f"not a file of task {name}"):
            load_task(name, path, None, 0)
    path.write_text("")
    with pytest.raises(LabError, match="empty"):
        load_task("ag_news", path, None, 0)


def test_a_missing_figure_is_a_dash() -> None:
    rows: list[dict[str, object]] = [{"a": 0.5, "b": "x"}, {"b": "y"}]
    lines = table([("A", "a", "{:.2f}"), ("B", "b", "{}")], rows).splitlines()
    assert lines == ["|    A |   B |", "| ---: | --: |", "| 0.50 |   x |", "|    - |   y |"]
