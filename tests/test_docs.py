"""What README and CONTRIBUTING say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from offramp import __version__
from offramp.server.options import options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Names of options that are not of `offramp serve`, with the file that declares them.
OTHER_FLAGS = {
    "--model": "server/commands/exits.py",
    "--exit-layers": "server/commands/exits.py",
    "--prompts": "server/commands/exits.py",
    "--save-answers": "server/commands/exits.py",
    "--out": "server/commands/exits.py",
    "--work": "server/commands/exits.py",
    "--plot": "server/commands/exits.py",
    "--backbone": "server/commands/exits.py",
    "--quality": "server/lab/calibrate.py",
    "--concurrency": "server/bench/command.py",
    "--modes": "server/bench/command.py",
    "--peer": "server/bench/command.py",
    "--max-tokens": "server/bench/command.py",
    "--rounds": "server/bench/command.py",
    "--long-prompt": "server/bench/command.py",
    "--profile": "server/bench/command.py",
}
NOT_OURS = {"--help"}


def test_the_readme_begins_with_the_two_commands() -> None:
    """They come before any other code block, and make has both."""
    first = README.split("```console\n")[1].split("```")[0]
    targets = [line.split()[2] for line in first.splitlines()]
    assert targets == ["serve", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_flag_exists() -> None:
    known = {option.flag for option in options()}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - NOT_OURS - known:
        assert flag in OTHER_FLAGS, flag
        source = (ROOT / OTHER_FLAGS[flag]).read_text(encoding="utf-8")
        assert f'"{flag}"' in source, flag


def test_the_defaults_in_the_readme_are_the_defaults() -> None:
    """Rows of the options table whose default is a number or a word."""
    defaults = {option.flag: option.field.default for option in options()}
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `?([\w.-]+)`? \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for flag, shown in rows:
        if defaults[flag] is None or defaults[flag] == ():
            assert shown == "unset", flag
        else:
            assert shown == str(defaults[flag]), flag


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:[\w.]+/)+[\w.]+\.py)", CONTRIBUTING)))
)
def test_every_file_named_exists(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    ("path", "name"), sorted(set(re.findall(r"`([\w/.]+\.py):([\w.]+)`", CONTRIBUTING)))
)
def test_every_name_after_a_file_is_in_it(path: str, name: str) -> None:
    """A bare file name is one of the engine's."""
    file = ROOT / path if "/" in path else ROOT / "server" / "engine" / path
    source = file.read_text(encoding="utf-8")
    for part in name.split("."):
        assert re.search(rf"\b(class|def) {part}\b|^{part}\b", source, re.MULTILINE), part


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
