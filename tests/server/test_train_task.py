"""``offramp exits train-task`` on the tiny model: files, results, serving, refusals."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from offramp.models.exits.decision_heads import read_decision_metadata
from offramp.models.sampling_params import NEVER
from offramp.server.commands.exits import main
from offramp.server.commands.train_task import _split, default_layers
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine, runner_of
from offramp.server.engine.engine import Engine
from offramp.server.engine.request import AnswerRequest, AnswerResult, DecisionRequest
from offramp.server.text.decisions import encode_questions
from offramp.server.text.labelled import read_labelled
from offramp.server.text.prompts import PromptFileError
from offramp.server.text.tokenizer import Tokenizer

QUESTION = "Which letter is it?"
ROWS = 240


def rows_of(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of one letter, and which one."""
    chance = random.Random(seed)
    letters = [chance.choice("xo") for _ in range(count)]
    texts = [" ".join([letter * chance.randint(2, 5)] * chance.randint(1, 4)) for letter in letters]
    return list(zip(texts, letters, strict=True))


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    match path.suffix:
        case ".tsv":
            lines = ["sentence\tletter", *(f"{text}\t{letter}" for text, letter in rows)]
        case ".csv":
            lines = [f'{letter},"a title","{text}"' for text, letter in rows]
        case _:
            lines = [json.dumps({"text": text, "letter": letter}) for text, letter in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


FIELDS = {
    ".tsv": ("--text", "sentence", "--label", "letter"),
    ".csv": ("--text", "3", "--label", "1"),
    ".jsonl": ("--label", "letter"),
}


def train(tiny_dir: Path, data: Path, out: Path, *more: str) -> int:
    words = ["train-task", "--model", str(tiny_dir), "--data", str(data), "--out", str(out)]
    asked = ["--name", "letter", "--instructions", QUESTION, "--labels", "cross=x,nought=o"]
    return main([*words, *asked, *more])


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The heads of a task, trained with labels."""
    folder = tmp_path_factory.mktemp("task")
    data, out = write(folder / "rows.tsv", rows_of(ROWS)), folder / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[".tsv"]) == 0
    return out


def engine_with(tiny_dir: Path, heads: Path) -> Engine:
    config = EngineConfig(
        device="cpu",
        exits="none",
        draft_head="none",
        decision_heads=str(heads),
        max_model_len=256,
    )
    return build_engine(config, tiny_dir, model_name="tiny", num_blocks=64, check_invariants=True)


def answers_of(
    engine: Engine, folder: Path, texts: Sequence[str], bounds: tuple[float, ...]
) -> list[AnswerResult]:
    """What the engine says to the trained question about texts."""
    tokenizer = Tokenizer.load(folder)
    task = engine.info.decision_tasks["letter"]
    found: list[AnswerResult] = []
    for number, text in enumerate(texts):
        message = {"role": "user", "content": text}
        asked = [(task.wording, task.labels)]
        (own,) = encode_questions(tokenizer, [message], asked, engine.info.eos_token_ids[0])
        candidates = (0, 1) if task.labelled else own.tree.reads[0].candidates
        read = AnswerRequest(own.prompt, candidates, "letter", task.labelled, bounds)
        engine.add(DecisionRequest(str(number), (read,)), time.monotonic())
        while engine.has_work:
            for event in engine.step().events:
                found += event.answers
    return found


def test_the_written_heads_serve(tiny_dir: Path, trained: Path) -> None:
    engine = engine_with(tiny_dir, trained)
    assert engine.info.decision_layers == (1, 2, 3)
    task = engine.info.decision_tasks["letter"]
    assert task.labels == ("cross", "nought")
    assert task.wording == "Which letter is it?\nAnswer with cross or nought."
    assert task.layers == (1, 2, 3)
    assert task.points
    rows = rows_of(60, 7)
    texts = [text for text, _ in rows]
    early = answers_of(engine, tiny_dir, texts, task.points[0].thresholds)
    full = answers_of(engine, tiny_dir, texts, (NEVER,) * 3)
    assert {answer.layer for answer in full} == {4}
    assert sum(answer.layer for answer in early) < 2 * len(rows)
    for found in (early, full):
        right = [
            ("x", "o")[answer.logits.index(max(answer.logits))] == letter
            for answer, (_, letter) in zip(found, rows, strict=True)
        ]
        assert sum(right) >= 0.95 * len(rows)


def test_what_is_printed_is_in_the_file(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", rows_of(ROWS))
    out = tmp_path / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[".jsonl"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = read_decision_metadata(out)["tasks"]["letter"]
    assert stored["metrics"] == printed
    assert printed["data"] == "rows.jsonl"
    assert printed["rows"] == ROWS
    assert stored["labelled"] is True
    assert printed["held_out"] == ROWS // 5
    assert printed["accuracy"]["full_depth"] >= 0.95
    assert set(printed["accuracy"]["layers"]) == {"1", "2", "3"}
    qualities = [point[0] for point in stored["points"]]
    assert qualities == [point["quality"] for point in printed["points"]]
    assert main(["info", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["letter"]["labels"] == ["cross", "nought"]


@pytest.mark.parametrize("suffix", FIELDS)
def test_equal_rows_give_equal_heads_whatever_file_they_come_in(
    tiny_dir: Path, trained: Path, tmp_path: Path, suffix: str
) -> None:
    data = write(tmp_path / f"rows{suffix}", rows_of(ROWS))
    out = tmp_path / "b.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[suffix]) == 0
    found, expected = (read_decision_metadata(path)["tasks"]["letter"] for path in (out, trained))
    for own in (found, expected):
        own["metrics"].pop("data")
    assert found == expected


def test_another_seed_keeps_other_rows_aside(tiny_dir: Path, trained: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.tsv", rows_of(ROWS))
    out = tmp_path / "b.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[".tsv"], "--seed", "1") == 0
    assert out.read_bytes() != trained.read_bytes()


def test_without_labels_the_models_own_answers_are_learnt(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that it gives at full depth, less what it says without an input."""
    data = write(tmp_path / "rows.jsonl", rows_of(ROWS))
    out = tmp_path / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, "--layers", "2,3") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["accuracy"]["zero_shot"] == printed["accuracy"]["full_depth"] == 1
    engine = engine_with(tiny_dir, out)
    assert engine.info.decision_layers == (2, 3)
    assert not engine.info.decision_tasks["letter"].labelled
    texts = ["N/A", *(text for text, _ in rows_of(60, 7))]
    none, *full = answers_of(engine, tiny_dir, texts, (NEVER, NEVER))
    early = answers_of(engine, tiny_dir, texts, (NEVER, 0.0))[1:]
    assert {answer.layer for answer in early} == {3}
    same = [
        (high.logits[0] - none.logits[0] > high.logits[1] - none.logits[1])
        == (low.logits[0] > low.logits[1])
        for high, low in zip(full, early, strict=True)
    ]
    assert sum(same) >= 0.8 * len(same)


def test_a_second_task_keeps_the_first(tiny_dir: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.decisions.safetensors"
    out.write_bytes(trained.read_bytes())
    data = write(tmp_path / "rows.tsv", rows_of(ROWS, 3))
    more = ("--name", "crossed", "--type", "predicate", "--labels", "yes=x,no=o", "--layers", "2")
    assert train(tiny_dir, data, out, *FIELDS[".tsv"], *more) == 0
    engine = engine_with(tiny_dir, out)
    assert list(engine.info.decision_tasks) == ["letter", "crossed"]
    assert engine.info.decision_layers == (1, 2, 3)
    assert engine.info.decision_tasks["crossed"].layers == (2,)
    before, after = (read_decision_metadata(path)["tasks"]["letter"] for path in (trained, out))
    assert before == after
    first, second = (engine_with(tiny_dir, path) for path in (trained, out))
    texts = [text for text, _ in rows_of(5)]
    bounds = (NEVER, NEVER, 0.0)
    assert answers_of(first, tiny_dir, texts, bounds) == answers_of(second, tiny_dir, texts, bounds)
    # Of one name there is one task.
    assert train(tiny_dir, data, out, *FIELDS[".tsv"], *more, "--layers", "3") == 0
    assert engine_with(tiny_dir, out).info.decision_tasks["crossed"].layers == (3,)


def test_scores_are_of_numbered_levels(tiny_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.tsv", rows_of(ROWS))
    out = tmp_path / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[".tsv"], "--type", "score") == 0
    task = engine_with(tiny_dir, out).info.decision_tasks["letter"]
    assert task.labels == ("0", "1")
    assert "0: cross\n1: nought" in task.wording


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.safetensors"], "ends in .decisions.safetensors"),
        (["--data", "nowhere.tsv"], "nowhere.tsv"),
        (["--text", "title"], "title"),
        (["--label", "mark"], "mark"),
        (["--labels", "cross=x,nought=0"], "row"),
        (["--layers", "1,4"], "4 layers"),
        (["--type", "predicate"], "yes=VALUE,no=VALUE"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tiny_dir: Path,
    tmp_path: Path,
    words: Sequence[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "rows.tsv", rows_of(ROWS))
    out = tmp_path / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[".tsv"], *words) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("labels", ["nought=x,naught=o", "no 1=x,no 2=o", "a=x,ab=o"])
def test_answers_that_begin_alike_need_labels(
    tiny_dir: Path, tmp_path: Path, labels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's own answers are told by their first token; heads tell any."""
    data = write(tmp_path / "rows.tsv", rows_of(ROWS))
    out = tmp_path / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, "--text", "sentence", "--labels", labels) == 1
    assert "same token" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data]
    assert train(tiny_dir, data, out, *FIELDS[".tsv"], "--labels", labels) == 0
    metrics = read_decision_metadata(out)["tasks"]["letter"]["metrics"]
    assert metrics["accuracy"]["zero_shot"] is None
    assert metrics["accuracy"]["full_depth"] > 0.9


def test_a_few_rows_are_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.tsv", rows_of(199))
    out = tmp_path / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[".tsv"]) == 1
    assert "199 rows" in capsys.readouterr().err
    assert not out.exists()


def test_a_text_longer_than_the_context_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.tsv", [*rows_of(ROWS), ("x" * 3000, "x")])
    out = tmp_path / "a.decisions.safetensors"
    assert train(tiny_dir, data, out, *FIELDS[".tsv"]) == 1
    assert f"row {ROWS + 1}" in capsys.readouterr().err
    assert not out.exists()


def test_heads_of_another_model_are_not_added_to(
    tiny_dir: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.decisions.safetensors"
    text = trained.read_bytes()
    own = read_decision_metadata(trained)["fingerprint"].encode()
    out.write_bytes(text.replace(own, own[::-1]))
    data = write(tmp_path / "rows.tsv", rows_of(ROWS))
    assert train(tiny_dir, data, out, *FIELDS[".tsv"]) == 1
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize("labels", ["cross", "cross=x,cross=o", "", "a=1,b=1"])
def test_answers_must_differ(labels: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(Path("tiny"), Path("rows.tsv"), Path("a"), "--labels", labels)
    assert "--labels" in capsys.readouterr().err


@pytest.mark.parametrize("num_layers", range(2, 100))
def test_default_layers_fit_every_depth(num_layers: int) -> None:
    layers = default_layers(num_layers)
    assert layers
    assert list(layers) == sorted(set(layers))
    assert 1 <= layers[0] <= max(1, num_layers // 5)
    assert layers[-1] < num_layers


def test_rows_that_thresholds_are_judged_on_are_not_learnt_from() -> None:
    parts = [part.tolist() for part in _split(1003, 5)]
    assert sorted(row for part in parts for row in part) == list(range(1003))
    assert [len(part) for part in parts] == [603, 200, 200]
    assert parts != [part.tolist() for part in _split(1003, 6)]


def test_default_layers_of_the_embedded_model() -> None:
    assert len(default_layers(30)) == 11


def test_the_runner_of_the_tiny_model_knows_its_tasks(tiny_dir: Path, trained: Path) -> None:
    decider = runner_of(engine_with(tiny_dir, trained)).decider
    assert decider is not None
    assert decider.bounds == (0, 1, 2, 3, 4)


def labelled(path: Path, text: str, fields: Sequence[str] = ("1",), **options: Any) -> Any:
    path.write_bytes(text.encode())
    return read_labelled(path, fields, options.get("label"), options.get("values", ("x", "o")))


@pytest.mark.parametrize(
    ("name", "text", "texts"),
    [
        ("a.csv", 'x,"a, b"\r\no,c\r\n', ["a, b", "c"]),
        ("a.csv", 'x,"two\nlines"\no,c', ["two\nlines", "c"]),
        ("a.csv", "mark,what is it\nx,a\no,c", None),
        ("a.csv", "mark,said\nx,a\no,c", ["a", "c"]),
        ("a.csv", "x,a\u2028b\no,c\x0bd", ["a\u2028b", "c\x0bd"]),
        ("a.tsv", 'x\t"a\no\tc "d" e', ['"a', 'c "d" e']),
        (
            "a.jsonl",
            '{"1": "x", "2": "a\u2028b\x85c"}\n\n{"1": "o", "2": 5}\n',
            ["a\u2028b\x85c", "5"],
        ),
        ("a.json", '[{"1": "x", "2": "a"}, {"1": "o", "2": null}]', ["a", "None"]),
    ],
)
def test_files_of_rows(tmp_path: Path, name: str, text: str, texts: list[str] | None) -> None:
    if texts is None:
        with pytest.raises(PromptFileError, match="row 1"):
            labelled(tmp_path / name, text, ("2",), label="1")
        return
    found = labelled(tmp_path / name, text, ("2",), label="1")
    assert found.texts == texts
    assert found.answers == [0, 1]


def test_several_fields_make_one_text(tmp_path: Path) -> None:
    found = labelled(tmp_path / "a.csv", "title,body\n a ,b\nc,d\n", ("title", "2"))
    assert found.texts == ["a. b", "c. d"]
    assert found.answers is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "not valid JSON"),
        ("a.jsonl", b"[1]\n", "not a list of objects"),
        ("a.json", b'{"1": "x"}', "not a list of objects"),
        ("a.tsv", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b'x,"' + b"a" * 200_000 + b'"', "a.csv"),
        ("a.csv", b"5\n6", "no field or answer '2'"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptFileError, match=message):
        read_labelled(path, ("2",), None, ("x", "o"))
