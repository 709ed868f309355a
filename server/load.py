"""The engine of a server, made where it runs: on its thread, or in its process."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from offramp.server.api.plan import default_fault
from offramp.server.config import ServerConfig
from offramp.server.engine.loop import EngineProtocol
from offramp.server.errors import EngineConfigError
from offramp.server.progress import bar


def load_engine(config: ServerConfig, folder: Path) -> EngineProtocol:
    """Load the model in ``folder`` and make its engine; raises EngineConfigError for what is known.

    Whatever else is raised may pass: memory that is not there just now, say.
    """
    # Takes torch with it, which the port and its probes need not wait for.
    from offramp.models.errors import ModelError  # noqa: PLC0415
    from offramp.server.engine.build import build_engine  # noqa: PLC0415

    try:
        with bar("loading weights") as progress:
            engine = build_engine(
                config.engine,
                folder,
                model_name=config.engine.model,
                progress=progress,
                server=os.getppid() if config.engine_worker == "process" else None,
            )
    except ModelError as error:
        raise EngineConfigError(str(error)) from error
    fault = default_fault(config, engine.info)
    if fault is not None:
        raise EngineConfigError(fault)
    settle_memory()
    return engine


def settle_memory() -> None:
    """Give back what only loading needed; what is left is never garbage: never look at it again."""
    from offramp.models.cpu import return_freed_memory  # noqa: PLC0415 (takes torch with it)

    gc.collect()
    gc.freeze()
    return_freed_memory()
