"""The ``offramp`` command: picks the subcommand and imports nothing else.

A subcommand is a ``module:function`` that takes the remaining arguments and returns an exit
status (None is 0); its module is imported only when it is chosen.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

from offramp import __version__

Command = Callable[[Sequence[str]], int | None]

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "serve": ("offramp.server.cli:serve", "serve a model over OpenAI's API"),
    "pull": ("offramp.models.loading.pull:main", "fetch a model into the cache"),
    "exits": ("offramp.server.commands.exits:main", "train, evaluate and inspect exits"),
    "bench": ("offramp.server.bench.command:main", "measure speed, depth and agreement"),
    "chat": ("offramp.server.commands.chat:main", "talk to a running server"),
    "doctor": ("offramp.server.commands.doctor:main", "look for what keeps a server from working"),
}
# A shell reports a program ended by Ctrl-C this way.
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in {"-h", "--help"}:
        sys.stdout.write(usage())
        return 0
    if name == "--version":
        sys.stdout.write(f"offramp {__version__}\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"offramp: unknown command {name!r}\n\n{usage()}")
        return 2
    try:
        return _load(COMMANDS[name][0])(words[1:]) or 0
    except KeyboardInterrupt:
        return _INTERRUPTED


def serve(argv: Sequence[str]) -> int | None:
    """``offramp serve``: read the options, then load the server."""
    # Imported here so that other commands do not pay for pydantic.
    from offramp.server.options import parse  # noqa: PLC0415

    config = parse(argv, os.environ)
    run: Callable[[object], int | None] = _load("offramp.server.serve:run")
    return run(config)


def usage() -> str:
    """Text of ``offramp --help``."""
    lines = "\n".join(f"  {name:<8}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: offramp COMMAND [OPTIONS]\n\n"
        "An OpenAI-compatible inference server with adaptive early exit.\n\n"
        f"commands:\n{lines}\n\n"
        "offramp COMMAND --help shows the options of a command.\n"
    )


def _load(target: str) -> Callable[..., int | None]:
    module, _, function = target.partition(":")
    loaded: Callable[..., int | None] = getattr(importlib.import_module(module), function)
    return loaded
