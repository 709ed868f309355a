"""The machine under a server: versions, processors, kernels, memory, and limits of the system."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from offramp import __version__
from offramp.kernels import native, native_build
from offramp.kernels.weight_formats import WeightFormat, available
from offramp.models.config import Weights
from offramp.paths import cache_folder
from offramp.server.config import GIB, ServerConfig
from offramp.server.doctor.findings import Finding, Level
from offramp.server.doctor.limits import cores, cpu_quota, memory_available
from offramp.server.engine.device import placement

_PACKAGES = ("torch", "transformers", "tokenizers", "triton")
# Descriptors of a server beside its connections: libraries, logs, the way to other processes.
_OWN_FILES = 64


def versions() -> Iterator[Finding]:
    """What runs."""
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    yield Finding("versions", f"offramp {__version__}, {', '.join(found)}, {platform.platform()}")


def device(config: ServerConfig) -> Iterator[Finding]:
    """Where the model would run; raises EngineConfigError where it cannot."""
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            "GPU",
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
        )
    chosen, dtype = placement(config.engine)
    kind = "the CPU" if chosen.type == "cpu" else "the GPU"
    yield Finding("device", f"{kind}, in {str(dtype).removeprefix('torch.')}")


def processor(config: ServerConfig) -> Iterator[Finding]:
    """Cores, threads, and what the cgroups leave of them."""
    names = native_build.cpuinfo("model name") or [platform.processor() or platform.machine()]
    runs = [each.name for each in native_build.VARIANTS if native_build.runs_here(each)]
    sets = f"; instruction sets {', '.join(runs)}" if runs else ""
    yield Finding("processor", f"{names[0]}{sets}")
    threads, quota, most = config.engine.threads or torch.get_num_threads(), cpu_quota(), cores()
    granted = "" if quota is None else f", a quota of {quota:g}"
    text = f"{threads} threads on {most} cores{granted}"
    bound = most if quota is None else min(most, quota)
    if threads > bound:
        # Threads of a step wait for each other, and one of them then always waits for its turn.
        advice = f"use --threads {max(1, int(bound))}: with more, every step waits for the system"
        yield Finding("threads", text, Level.WARNING, advice)
    else:
        yield Finding("threads", text)


def kernels(config: ServerConfig) -> Iterator[Finding]:
    """Which C kernels would serve on a CPU, and the forms of weights they allow."""
    if placement(config.engine)[0].type != "cpu":
        yield Finding("kernels", "Triton's")
        return
    if config.engine.kernels == "torch":
        yield Finding("kernels", "torch's operators, as --kernels torch says")
        return
    folder, compiler = cache_folder() / "kernels", native_build.find_compiler()
    found = native_build.at_hand(folder)
    if found is not None:
        yield from _loaded(found, config)
    elif compiler is None or not writable(folder):
        lacks = "no C compiler" if compiler is None else f"{folder} cannot be written"
        needed = config.engine.kernels == "native"
        yield Finding(
            "kernels",
            f"none: {lacks}; torch's operators serve, more slowly",
            Level.ERROR if needed else Level.WARNING,
            "install gcc or clang, or set CC to one, or install a wheel that has the kernels"
            if compiler is None
            else "make it writable, or set OFFRAMP_CACHE_DIR",
        )
    else:
        yield Finding("kernels", f"C, compiled at the first start with {' '.join(compiler)}")


def _loaded(path: Path, config: ServerConfig) -> Iterator[Finding]:
    library = native.library()
    if library is None:
        level = Level.ERROR if config.engine.kernels == "native" else Level.WARNING
        yield Finding("kernels", "none can be loaded; torch's operators serve", level)
        return
    kind = "compiled for this machine"
    if path.parent == native_build.PREBUILT:
        kind = f"prebuilt for {path.stem}"
    yield Finding("kernels", f"C, {kind}{', with AMX' if library.has_amx else ''}")
    forms = [form for form in WeightFormat if form is not WeightFormat.PLAIN and available(form)]
    text = f"{', '.join(forms)}; --weights {config.engine.weights}"
    if config.engine.weights in {Weights.AUTO, Weights.INT8, Weights.INT4}:
        yield Finding("weights", text)
    else:
        advice = "--weights auto is as exact as the model allows, and the fastest of these"
        exact = config.engine.weights is Weights.FP32
        yield Finding("weights", text, Level.OK if exact else Level.WARNING, advice)


def files(config: ServerConfig) -> Iterator[Finding]:
    """Whether there are descriptors enough for the connections that the options allow."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.engine.max_num_seqs + config.max_num_queued_reqs + _OWN_FILES
    if hard in {resource.RLIM_INFINITY, -1}:
        yield Finding("open files", "no limit")
    elif hard < needed:
        yield Finding(
            "open files",
            f"{hard} at most, {needed} for all requests that may run and wait",
            Level.WARNING,
            f"raise the hard limit (ulimit -Hn {needed}, LimitNOFILE=), "
            "or lower --max-num-queued-reqs",
        )
    else:
        yield Finding("open files", f"{hard} at most")


def memory() -> Iterator[Finding]:
    """What is free, whoever would take it."""
    free = memory_available()
    yield Finding("memory", "unknown" if free is None else f"{free / GIB:.1f} GiB free")


def writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, which may have to be made itself."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of ``folder``, which may have to be made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
