"""``offramp bench decisions``: its figures, and what it refuses to report."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from offramp.models.exits.decision_heads import DecisionFile
from offramp.models.exits.points import DecisionPoint
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.server.bench import decisions
from offramp.server.bench.command import decisions_parser
from offramp.server.bench.common import BenchError, Refused, UsageError
from offramp.server.bench.decisions import Asked
from offramp.server.text.decisions import predicate
from offramp.server.text.labelled import LabelledTexts
from tests.server.fakes import byte_backend

from .deciding import LAYERS, Recorder, serve, tiny_engine
from .test_decision_tasks_api import SURE, sure_task


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"Row {n}.", "label": "yes" if n % 4 else "no"} for n in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def options(data: Path, *words: str) -> argparse.Namespace:
    fixed = ["--data", str(data), "--label", "label", "--type", "predicate"]
    fixed += ["--instructions", SURE, "--labels", "yes,no", "--rows", "8", "--rounds", "2"]
    return decisions_parser().parse_args([*fixed, *words])


@pytest.fixture
def trained(tiny_dir: Path, tmp_path: Path) -> Recorder:
    """Heads that always say yes, sure enough to leave after layer 3."""
    own = fingerprint(load_weights(tiny_dir, config_from_hf(tiny_dir), dtype=torch.float32))
    path = tmp_path / "a.decisions.safetensors"
    points = (DecisionPoint(0.98, (0.9, 0.9), 0.99, 3.0),)
    task = sure_task("sure", predicate(SURE).wording, points)
    DecisionFile(own, {"sure": task}).save(path)
    return tiny_engine(tiny_dir, str(path))


async def measured(engine: Recorder, args: argparse.Namespace) -> Any:
    async with serve(engine, served_model_name=(args.model,)) as server:
        args.url = server.url
        return await asyncio.to_thread(decisions.bench, args, "the command", lambda _: None)


def run(engine: Recorder, args: argparse.Namespace) -> Any:
    """The command reads files, which the server's event loop may not."""
    return asyncio.run(measured(engine, args))


def test_modes_side_by_side(trained: Recorder, data: Path) -> None:
    args = options(data, "--questions", "1,3", "--concurrency", "2")
    report = run(trained, args)
    rows = {(row["mode"], row["questions"]): row for row in report.document["rows"]}
    assert set(rows) == {("off", 1), ("off", 3), ("adaptive", 1), ("adaptive", 3)}
    for row in rows.values():
        assert row["accuracy"] == 0.75
        assert row["agreement"] == 1.0
        assert row["per_s"] > 0
    off = rows["off", 1]
    assert (off["mean_layer"], off["executed"], off["ratio"]) == (LAYERS, 1.0, 1.0)
    assert rows["adaptive", 1]["mean_layer"] == 3
    assert rows["adaptive", 1]["executed"] == pytest.approx(3 / LAYERS)
    # The other two questions are nobody's task.
    assert rows["adaptive", 3]["mean_layer"] == pytest.approx((3 + 2 * LAYERS) / 3, abs=0.001)
    # 0.99 sure and right three times in four.
    assert off["ece"] == pytest.approx(0.24, abs=0.001)
    assert json.loads(report.output().splitlines()[-1])["command"] == "the command"


def test_transformers_beside_it(
    trained: Recorder, data: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    # The model that is served, with the tokenizer of the fixture's server.
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=byte_backend()).save_pretrained(folder)
    words = ["--modes", "off", "--concurrency", "1", "--peer", "transformers", "--task", "none"]
    words += ["--calibration", "none", "--model", str(folder)]
    off, theirs = run(trained, options(data, *words)).document["rows"]
    assert (off["mode"], theirs["mode"]) == ("off", "transformers")
    assert (theirs["executed"], theirs["mean_layer"]) == (1.0, None)
    # The same weights behind the same prompts.
    assert theirs["agreement"] == 1.0
    assert theirs["brier"] == pytest.approx(off["brier"], abs=1e-3)


def test_too_few_rows_are_told(trained: Recorder, data: Path) -> None:
    args = options(data)
    args.rows = 9
    with pytest.raises(UsageError, match="16 rows; 18 are needed"):
        run(trained, args)


def test_a_server_that_refuses_ends_the_run(trained: Recorder, data: Path) -> None:
    with pytest.raises(BenchError, match=r"400 .*no task of that name"):
        run(trained, options(data, "--task", "nobody"))


class Server:
    """Answers as told, alone and in company."""

    def __init__(self, alone: Asked, company: Asked) -> None:
        self._answers = [alone, company]

    def ask(self, texts: list[str], *_: Any) -> tuple[list[Asked], float]:
        return [self._answers.pop(0)] * len(texts), 1.0


def asked(probability: float, *layers: int) -> Asked:
    return Asked(0.1, (probability, 1 - probability), layers, 1.0)


@pytest.mark.parametrize(
    ("alone", "company", "message"),
    [
        (asked(0.5, 4), asked(0.5, 4, 3), "left the stack early"),
        (asked(0.5, 4), asked(0.51, 4, 4), "differ by 1.0e-02"),
    ],
)
def test_a_wrong_mode_off_is_not_reported(alone: Asked, company: Asked, message: str) -> None:
    rows = LabelledTexts(["a"], None)
    server: Any = Server(alone, company)
    with pytest.raises(Refused, match=message):
        decisions._check(server, rows, 4)


def test_quality_by_hand() -> None:
    given = [asked(0.9), asked(0.8), asked(0.4)]
    found = decisions._quality(given, [0, 1, 1])
    assert found["accuracy"] == round(2 / 3, 4)
    assert found["brier"] == round((0.02 + 1.28 + 0.32) / 3, 4)
    # One bin each: 0.9 and right, 0.8 and wrong, 0.6 and right.
    assert found["ece"] == round((0.1 + 0.8 + 0.4) / 3, 4)
    assert decisions._quality(given, None)["accuracy"] is None
    assert math.isclose(sum(given[0].probabilities), 1)
