"""The application: routes, middleware and error handlers around one engine driver."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from offramp import __version__
from offramp.server.api import (
    chat,
    completions,
    decisions,
    embeddings,
    models,
    ops,
    tokenize,
    wire,
)
from offramp.server.api.context import Context
from offramp.server.api.middleware import ApiKey, BodyLimit, HeadAsGet, InFlight, RequestId

_ROUTERS: tuple[APIRouter, ...] = (
    chat.router,
    completions.router,
    decisions.router,
    embeddings.router,
    models.router,
    ops.router,
    tokenize.router,
)


def create_app(context: Context) -> FastAPI:
    """The ASGI application; ``context.driver`` may still be loading, or a fake engine's.

    Starting and stopping the driver is left to the caller.
    """
    app = FastAPI(title="Offramp", version=__version__, redirect_slashes=False)
    app.state.context = context
    for router in _ROUTERS:
        app.include_router(router)
    wire.register(app)
    # The one added last sees a request first.
    app.add_middleware(InFlight, context=context)
    app.add_middleware(BodyLimit, max_bytes=context.config.max_body_bytes)
    if context.config.api_key:
        app.add_middleware(ApiKey, keys=context.config.api_key)
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
