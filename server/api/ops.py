"""Routes for operators: health, readiness, load, version, metrics."""

import asyncio
import time
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from pydantic import BaseModel

from offramp import __version__
from offramp.server.api.context import Shared
from offramp.server.engine.driver import EngineState

router = APIRouter(tags=["Operations"])

# Far longer than any step: an engine silent this long with work to do will not come back.
STALLED_AFTER_S: Final = 120.0


class Status(BaseModel):
    """One word."""

    status: str


# Probes read the status, so that it says itself why it is not 200.
_UNAVAILABLE: Final[dict[int | str, dict[str, Any]]] = {
    503: {"model": Status, "description": "Not now."}
}


@router.get("/health", response_model=Status, responses=_UNAVAILABLE)
async def health(context: Shared) -> Response:
    """Liveness: 503 once the engine failed or hangs; loading and draining are healthy."""
    driver = context.driver
    if driver.state is EngineState.FAILED:
        return _status(503, "failed")
    # An idle engine makes no steps; its silence counts from the moment it got work.
    silence = time.monotonic() - max(driver.last_step_at, context.busy_since)
    if driver.num_requests and silence > STALLED_AFTER_S:
        return _status(503, "stalled")
    return _status(200, "ok")


@router.get("/ready", response_model=Status, responses=_UNAVAILABLE)
async def ready(context: Shared) -> Response:
    """Readiness: 200 only while requests are accepted."""
    state = context.driver.state
    is_ready = state is EngineState.READY and context.tokenizer is not None
    return _status(200 if is_ready else 503, state.value)


@router.get("/load")
async def load(context: Shared) -> dict[str, int]:
    """Requests under /v1 that have not been answered to their end."""
    return {"server_load": context.in_flight}


@router.get("/version")
async def version() -> dict[str, Any]:
    """Version of the server."""
    return {"version": __version__}


@router.get("/metrics", response_model=None, response_class=PlainTextResponse)
async def metrics(context: Shared) -> Response:
    """Prometheus' text format, whatever is asked for."""
    driver = context.driver
    context.metrics.server(
        {state.value: state is driver.state for state in EngineState},
        driver.num_restarts,
        context.in_flight,
        len(context.connections),
    )
    # Not OpenMetrics: prometheus_client writes the colons of names as underscores there, unless its
    # reader knows of escaping, as Prometheus does from version 3 on.
    text = await asyncio.to_thread(generate_latest, context.metrics.registry)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


def _status(code: int, status: str) -> JSONResponse:
    return JSONResponse({"status": status}, status_code=code)
