"""Work that ends when its client goes away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

T = TypeVar("T")


class ClientDisconnected(Exception):
    """Nobody waits for the answer any more; it is never sent."""


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of ``work``; raises ClientDisconnected, with ``work`` cancelled, if the client left.

    The body of ``request`` must have been read: what comes next on its channel is the disconnect.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
