"""Model, exits and prompts of the lab's tests."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from offramp.server.lab.options import add_options
from offramp.server.lab.workbench import Workbench, open_workbench
from tests.server.lab.easy import write_easy, write_exits, write_prompts


@pytest.fixture(scope="session")
def easy_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_easy(tiny_dir, tmp_path_factory.mktemp("easy"))


@pytest.fixture
def exits(easy_dir: Path, tmp_path: Path) -> Path:
    return write_exits(easy_dir, tmp_path / "exits.safetensors")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.txt", 96)


@pytest.fixture
def bench(easy_dir: Path, exits: Path, prompts: Path) -> Workbench:
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = ["--model", str(easy_dir), "--exits", str(exits), "--prompts", str(prompts)]
    words += ["--max-tokens", "12", "--concurrency", "8", "--threads", "1"]
    return open_workbench(parser.parse_args(words), every_exit=True)
