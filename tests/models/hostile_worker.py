"""Loads model folders that a test has spoilt, in a process that may die of them.

Reads one JSON object a line: ``folder``, and ``options`` of the engine. Answers each with one:
``refused`` with the message, or ``answered`` with the number of tokens, and the seconds it took.
Any other exception ends it with a traceback.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from offramp.models.errors import ModelError
from offramp.models.sampling_params import ExitMode, ExitSettings, SamplingParams
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import FinishReason, GenerationRequest
from offramp.server.errors import EngineConfigError

_ROOM = 1024**3
_PROMPT = tuple(3 + i % 300 for i in range(40))
_OPTIONS: dict[str, Any] = {"threads": 1, "max_num_seqs": 2, "kv_cache_memory": 0.01}


def load(folder: Path, options: dict[str, Any]) -> tuple[str, Any]:
    """What becomes of the folder."""
    config = EngineConfig(**{**_OPTIONS, **options})
    try:
        engine = build_engine(config, folder, model_name="hostile")
    except (ModelError, EngineConfigError) as error:
        return "refused", str(error)
    modes = [ExitMode.OFF]
    modes += [ExitMode.ADAPTIVE] if engine.info.exit_layers else []
    modes += [ExitMode.LOSSLESS] if engine.info.draft_head else []
    # Not all of a long context, and not more than fits a short one.
    prompt = _PROMPT[: max(1, engine.info.max_model_len - 8)]
    room = max(1, min(6, engine.info.max_model_len - len(prompt)))
    requests = [
        GenerationRequest(mode, prompt, SamplingParams(room, 0.0), ExitSettings(mode=mode))
        for mode in modes
    ]
    done = run_all(engine, requests, concurrency=len(requests))
    assert all(each.reason in {FinishReason.LENGTH, FinishReason.STOP} for each in done), done
    return "answered", sum(len(each.token_ids) for each in done)


def main() -> None:
    """Serve the test until its end of the pipe is closed."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        case = json.loads(line)
        begun = time.perf_counter()
        kind, value = load(Path(case["folder"]), case.get("options", {}))
        seconds = time.perf_counter() - begun
        sys.stdout.write(json.dumps({"kind": kind, "value": value, "seconds": seconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
