"""What README, CONTRIBUTING and docs say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from offramp import __version__
from offramp.server.options import options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES |= {
    ROOT / name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")
}
# A page that quotes what other programs said.
QUOTES = ROOT / "docs" / "conformance.md"
TEXT = "\n".join(text for path, text in PAGES.items() if path != QUOTES)
# Flags of other programs.
NOT_OURS = {"--help", "--cuda-graph-trace", "--graph-profiling", "--decision-bench-only"}


def test_the_readme_begins_with_the_two_commands() -> None:
    """They come before any other code block, and make has both."""
    first = README.split("```console\n")[1].split("```")[0]
    targets = [line.split()[2] for line in first.splitlines()]
    assert targets == ["serve", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_flag_exists() -> None:
    """An option of `offramp serve`, or one that a command of ours declares."""
    known = {option.flag for option in options()}
    known |= {f"--no-{option.flag[2:]}" for option in options() if option.is_bool}
    declared = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "server").rglob("*.py")
    )
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - NOT_OURS - known:
        assert f'"{flag}"' in declared, flag


def test_the_defaults_in_the_docs_are_the_defaults() -> None:
    """Rows of the options table whose default is a number or a word."""
    defaults = {option.flag: option.field.default for option in options()}
    page = PAGES[ROOT / "docs" / "options.md"]
    rows = re.findall(r"^\| `(--[a-z-]+)` \| [^|]*\| `([\w.-]+)` \|", page, re.MULTILINE)
    assert len(rows) >= 8
    for flag, shown in rows:
        default = defaults[flag]
        if default is None or default == ():
            assert shown == "unset", flag
        else:
            assert shown == (f"{default:g}" if isinstance(default, float) else str(default)), flag


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), (page.name, target)


def test_a_request_passes_fifteen_files_at_most() -> None:
    """The hop list names each file on the way of a request to its token."""
    hops = ARCHITECTURE.split("## From POST")[1].split("On the way back")[0]
    files = set(re.findall(r"[\w/]+\.py", hops))
    assert {"server/api/chat.py", "models/sampler.py"} <= files
    assert len(files) <= 15


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:server|models|kernels|tests)/[\w/]+\.py)", TEXT)))
)
def test_every_file_named_exists(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    ("path", "name"), sorted(set(re.findall(r"`([\w/.]+\.py):([\w.]+)`", TEXT)))
)
def test_every_name_after_a_file_is_in_it(path: str, name: str) -> None:
    """A bare file name is one of the engine's."""
    file = ROOT / path if "/" in path else ROOT / "server" / "engine" / path
    source = file.read_text(encoding="utf-8")
    for part in name.split("."):
        assert re.search(rf"\b(class|def) {part}\b|^{part}\b", source, re.MULTILINE), part


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
