"""``offramp doctor``: what a server would find on this machine, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from offramp import __version__
from offramp.models.errors import ModelNotAvailable
from offramp.models.loading.sources import find
from offramp.server import options
from offramp.server.config import ServerConfig
from offramp.server.doctor import machine, measure, model, serving
from offramp.server.doctor.findings import Check, Finding, Level, look

_MARKS = {Level.OK: ("ok", "green"), Level.WARNING: ("!", "yellow"), Level.ERROR: ("X", "red")}
_WIDTH = max(len(mark) for mark, _ in _MARKS.values())


def main(argv: Sequence[str]) -> int:
    """Look at everything and print it; 1 where something would keep a server from starting."""
    own, rest = _parser().parse_known_args(argv)
    variables, found = serving.environment(os.environ)
    config = options.parse(rest, variables)
    found = look("versions", machine.versions) + found
    for name, check in _checks(config):
        found += look(name, check)
    found += _model(config, measured=own.measure)
    failed = any(each.level is Level.ERROR for each in found)
    if own.json:
        document = {"version": __version__, "ok": not failed, "findings": list(map(asdict, found))}
        sys.stdout.write(f"{json.dumps(document, indent=2)}\n")
    else:
        show(found, Console())
    return int(failed)


def show(found: Iterable[Finding], console: Console) -> None:
    """A line for each finding, with its advice below it, and a line that sums them up."""
    findings = list(found)
    width = max(len(each.name) for each in findings)
    for each in findings:
        mark, colour = _MARKS[each.level]
        line = Text(f"{mark:>{_WIDTH}} ", style=colour)
        line.append(f"{each.name:<{width}}  ", style="bold").append(each.text, style="default")
        console.print(line, soft_wrap=True)
        if each.advice and each.level is not Level.OK:
            console.print(Text(f"{'':{_WIDTH + width + 3}}-> {each.advice}"), soft_wrap=True)
    errors = sum(each.level is Level.ERROR for each in findings)
    warnings = sum(each.level is Level.WARNING for each in findings)
    if errors:
        console.print(f"A server would not start: {errors} errors, {warnings} warnings.")
    else:
        console.print(f"A server would start: {warnings} warnings.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "offramp doctor",
        usage="offramp doctor [MODEL] [--measure] [--json] [OPTIONS of serve]",
        description="Check this machine, the options and the model as a server would find them.",
        epilog="All options of `offramp serve` are known here; they are checked and not used.",
        allow_abbrev=False,
    )
    parser.add_argument("--measure", action="store_true", help="load the model and time it")
    parser.add_argument("--json", action="store_true", help="all findings as JSON")
    return parser


def _checks(config: ServerConfig) -> list[tuple[str, Check]]:
    return [
        ("device", lambda: machine.device(config)),
        ("processor", lambda: machine.processor(config)),
        ("kernels", lambda: machine.kernels(config)),
        ("memory", machine.memory),
        ("open files", lambda: machine.files(config)),
        ("address", lambda: serving.address(config)),
        ("cache", serving.cache),
    ]


def _model(config: ServerConfig, *, measured: bool) -> list[Finding]:
    """Findings about the model, and with ``measured`` about its speed."""
    engine = config.engine
    try:
        folder = find(engine.model, revision=engine.revision)
    except ModelNotAvailable as error:
        return [Finding("model", str(error), Level.ERROR)]
    check = model.absent(engine) if folder is None else model.model(engine, folder)
    found = look("model", lambda: check)
    if not measured:
        return found
    if folder is None or any(each.level is Level.ERROR for each in found):
        return [*found, Finding("measure", "there is no model to measure", Level.WARNING)]
    return found + look("measure", lambda: measure.measure(engine, folder))
