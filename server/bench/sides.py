"""What is measured: Offramp and its peer, each as a target with the facts a report names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from offramp import __version__
from offramp.models.config import Weights
from offramp.server.bench.client import OverHTTP
from offramp.server.bench.dialects import LlamaCpp, Offramp
from offramp.server.bench.errors import LoadError
from offramp.server.bench.load import InProcess, Target
from offramp.server.bench.peer_batching import Batching
from offramp.server.bench.peer_gguf import gguf
from offramp.server.bench.peer_transformers import Transformers
from offramp.server.bench.process import ServerProcess, serving
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.device import placement

OWN_MODULE = "offramp.server.bench.own_server"
LLAMACPP_MODULE = "offramp.server.bench.peer_llamacpp"


@dataclass(frozen=True, slots=True)
class Room:
    """What each side has to hold: answers at once, tokens of each, and whether prompts are kept."""

    slots: int
    context: int
    threads: int
    keep_prompts: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    """A target; ``again`` is what reuses prompts it has seen, None if it cannot."""

    name: str
    target: Target
    again: Target | None
    facts: dict[str, Any]
    process: ServerProcess | None = None

    def document(self) -> dict[str, Any]:
        """Its facts, with the memory its process has needed so far."""
        peak = None if self.process is None else self.process.peak_memory_mib()
        return {"name": self.name, **self.facts, "peak_memory_mib": peak}


@contextmanager
def offramp(args: argparse.Namespace, folder: Path, room: Room) -> Iterator[Side]:
    """The engine in this process, a server started for this, or the one at ``args.url``."""
    facts: dict[str, Any] = {"version": __version__, "weights": args.weights}
    if args.url:
        yield _served(args, args.url, facts, None)
    elif serves(args):
        words = _serve_words(args, room)
        with serving(OWN_MODULE, *words) as process:
            yield _served(args, process.address(), {**facts, "threads": room.threads}, process)
    else:
        engine = build_engine(engine_config(args, room), folder, model_name=args.model)
        target = InProcess(engine, args.exit_threshold, args.kv_fill)
        info = engine.info
        facts |= {
            "threads": room.threads,
            "dtype": info.dtype,
            "exit_layers": info.exit_layers,
            "exit_thresholds": info.exit_thresholds,
        }
        yield Side("offramp", target, target, facts)


@contextmanager
def peer(args: argparse.Namespace, folder: Path, room: Room) -> Iterator[Side | None]:
    """The peer that was asked for, if any, with the same room."""
    if args.peer == "llamacpp":
        with _llamacpp(args, room) as side:
            yield side
    elif args.peer == "transformers":
        facts = {"version": transformers.__version__, "threads": room.threads}
        yield Side("transformers", Transformers(folder), None, facts)
    elif args.peer == "transformers-batching":
        device, dtype = placement(engine_config(args, room))
        facts = {"version": transformers.__version__, "device": str(device), "dtype": str(dtype)}
        target = Batching(folder, device, dtype, room.context)
        try:
            yield Side("transformers-batching", target, None, facts)
        finally:
            target.close()
    else:
        yield None


def serves(args: argparse.Namespace) -> bool:
    """Whether Offramp runs as a server of its own: HTTP is compared with HTTP."""
    return bool(args.peer == "llamacpp" if args.serve is None else args.serve)


@contextmanager
def _llamacpp(args: argparse.Namespace, room: Room) -> Iterator[Side]:
    try:
        import xllamacpp  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        raise LoadError("--peer llamacpp needs llama.cpp: pip install xllamacpp") from None
    path: Path = args.peer_gguf or gguf(args.model)
    if not path.is_file():
        raise LoadError(f"--peer-gguf {path}: no such file")
    words = [str(path), "--threads", str(room.threads)]
    words += ["--slots", str(room.slots), "--context", str(room.context)]
    with serving(LLAMACPP_MODULE, *words) as process:
        url = process.address()
        target = OverHTTP(url, LlamaCpp(cache_prompt=False))
        facts = {
            "version": f"xllamacpp {xllamacpp.__version__}",
            "build": xllamacpp.get_system_info().strip(" |\n"),
            "gguf": path.name,
            "threads": room.threads,
        }
        again = OverHTTP(url, LlamaCpp(cache_prompt=True))
        yield Side("llamacpp", target, again, facts, process)


def _served(
    args: argparse.Namespace, url: str, facts: dict[str, Any], process: ServerProcess | None
) -> Side:
    # A server of ours was given the quality as an option already.
    quality = args.exit_quality if process is None else None
    wishes = {"threshold": args.exit_threshold, "quality": quality, "kv_fill": args.kv_fill}
    given = {name: value for name, value in wishes.items() if value is not None}
    target = OverHTTP(url, Offramp(args.model, given), args.api_key)
    card = target.get("/v1/models")["data"][0]
    facts = {**facts, "exit_layers": card.get("exit_layers")}
    return Side("offramp", target, target, facts, process)


def _serve_words(args: argparse.Namespace, room: Room) -> list[str]:
    words = [args.model, "--port", "0", "--threads", str(room.threads)]
    words += ["--max-num-seqs", str(room.slots), "--max-model-len", str(room.context)]
    words += ["--exits", args.exits, "--exit-audit-rate", "0"]
    words += ["--device", args.device, "--dtype", args.dtype, "--weights", _weights(args)]
    if args.exit_quality is not None:
        words += ["--exit-quality", str(args.exit_quality)]
    if not room.keep_prompts:
        words.append("--no-enable-prefix-caching")
    return words


def engine_config(args: argparse.Namespace, room: Room) -> EngineConfig:
    """Offramp as it is measured in this process."""
    return EngineConfig(
        max_num_seqs=room.slots,
        max_model_len=room.context,
        exits=args.exits,
        exit_quality=args.exit_quality,
        exit_audit_rate=0.0,
        threads=room.threads,
        device=args.device,
        dtype=args.dtype,
        weights=_weights(args),
        enable_prefix_caching=room.keep_prompts,
    )


def _weights(args: argparse.Namespace) -> Weights:
    """Forms of weights are for CPUs; a GPU keeps them in its dtype."""
    return Weights(args.weights) if args.device == "cpu" else Weights.AUTO
