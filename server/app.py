"""The application: routes, middleware and error handlers around one engine driver."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from offramp import __version__
from offramp.server.api import (
    anthropic,
    chat,
    completions,
    decisions,
    embeddings,
    models,
    openapi,
    ops,
    playground,
    responses,
    tokenize,
    tokenizer_info,
    wire,
)
from offramp.server.api.context import Context
from offramp.server.api.http_metrics import HttpMetrics
from offramp.server.api.middleware import (
    OPEN_PATHS,
    ApiKey,
    BodyLimit,
    HeadAsGet,
    InFlight,
    RequestId,
)
from offramp.server.errors import Unauthorized
from offramp.server.tracing import TraceRequests

# With what their routes answer beside what FastAPI finds out by itself.
_ROUTERS: tuple[tuple[APIRouter, dict[int | str, dict[str, Any]]], ...] = (
    (anthropic.router, openapi.errors(openapi.RUNS_THE_MODEL, openapi.AnthropicError)),
    (chat.router, openapi.errors(openapi.RUNS_THE_MODEL) | openapi.STREAMED),
    (completions.router, openapi.errors(openapi.RUNS_THE_MODEL) | openapi.STREAMED),
    (decisions.router, openapi.errors(openapi.RUNS_THE_MODEL)),
    (embeddings.router, openapi.errors(openapi.RUNS_THE_MODEL)),
    (models.router, openapi.errors(openapi.READS)),
    (ops.router, {}),
    (responses.router, openapi.errors(openapi.RUNS_THE_MODEL)),
    (tokenize.router, openapi.errors(openapi.TAKES_A_BODY)),
    (tokenizer_info.router, openapi.errors(openapi.READS)),
)


def create_app(context: Context) -> FastAPI:
    """The ASGI application; ``context.driver`` may still be loading, or a fake engine's.

    Starting and stopping the driver is left to the caller.
    """
    app = openapi.DescribedApp(title="Offramp", version=__version__, redirect_slashes=False)
    app.state.context = context
    for router, answers in _ROUTERS:
        needs_key = context.keys and router is not ops.router
        form = openapi.AnthropicError if router is anthropic.router else openapi.ErrorEnvelope
        refused = openapi.errors([Unauthorized], form) if needs_key else {}
        app.include_router(router, responses=answers | refused)
    open_paths = OPEN_PATHS
    if context.config.playground:
        app.include_router(playground.router)
        open_paths |= playground.PATHS
    wire.register(app)
    # The one added last sees a request first.
    app.add_middleware(InFlight, context=context)
    app.add_middleware(BodyLimit, max_bytes=context.config.max_body_bytes)
    if context.tracing is not None:
        app.add_middleware(TraceRequests, tracing=context.tracing)
    if context.keys:
        most = context.config.max_requests_per_key
        app.add_middleware(ApiKey, keys=context.keys, open_paths=open_paths, most=most)
    app.add_middleware(HttpMetrics, metrics=context.metrics)
    app.add_middleware(HeadAsGet)
    if context.config.allowed_origins:
        # Before the keys: a browser asks beforehand without one.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=context.config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[wire.REQUEST_ID_HEADER],
        )
    app.add_middleware(RequestId)
    return app
