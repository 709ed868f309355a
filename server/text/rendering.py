"""Chat templates, rendered in a process that is bounded in time and memory (render_worker.py)."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Final, ParamSpec, TypeVar

from offramp.server.errors import ServerError
from offramp.server.text.render_worker import Reply, receive

# No conversation takes so long by the clock: the worker's own limit is of processor time.
_PATIENCE_S: Final = 60.0
# Threads that wait for the process or encode what it rendered.
_WORKERS: Final = ThreadPoolExecutor(4, thread_name_prefix="offramp-chat")

P = ParamSpec("P")
T = TypeVar("T")


class TemplateRefused(Exception):
    """The template raised something about the messages; the message says what."""


class TemplatePastLimits(TemplateRefused):
    """The template took too much time or memory, or wrote too much; the message says which."""


class Renderer:
    """A process that renders, started at the first use; threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._number = 0

    def start(self) -> None:
        """Start the process, so that the first conversation need not wait for it."""
        with self._lock:
            self._connected()

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> str:
        """The text of a conversation; ``options`` are variables, and transformers' own.

        Raises TemplateRefused, and ServerError where the process cannot work.
        """
        with self._lock:
            self._number += 1
            reply, text = self._exchange((self._number, template, messages, options))
        if reply is Reply.TEXT:
            return text
        raise (TemplateRefused if reply is Reply.REFUSED else TemplatePastLimits)(text)

    def close(self) -> None:
        """End the process; a later conversation starts another."""
        with self._lock:
            self._close()

    def _exchange(self, request: tuple[object, ...]) -> tuple[Reply, str]:
        try:
            connection = self._connected()
            connection.send_bytes(pickle.dumps(request))
            if connection.poll(_PATIENCE_S):
                number, reply, text = receive(connection)
                if number == self._number:
                    return reply, text
                fault = "answers another request"
            else:
                fault = "is stuck"
        except (EOFError, OSError, ValueError) as error:
            fault = f"ended ({str(error) or type(error).__name__})"
        self._close()
        raise ServerError(f"The process that renders chat templates {fault}.")

    def _connected(self) -> Connection:
        """The way to a process that waits for a request."""
        if self._process is not None and self._process.poll() is not None:
            self._close()
        if self._connection is None:
            self._connection, theirs = Pipe()
            command = (sys.executable, "-m", __name__.replace("rendering", "render_worker"))
            try:
                self._process = subprocess.Popen(  # noqa: S603 (our own module)
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Its libraries would start threads, which a process that forks must not have.
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    # The terminal's Ctrl-C is for the server, which lets answers end.
                    start_new_session=True,
                )
            finally:
                theirs.close()
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            # Its child ends with the connection, at the latest with its processor time.
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None


SHARED: Final = Renderer()
"""The one process of all tokenizers of this process."""
atexit.register(SHARED.close)


async def on_chat_worker(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run on a thread what renders a conversation.

    These threads are others than those of `asyncio.to_thread`: conversations whose template takes
    all of its time keep each other waiting, and no other route.
    """
    call = functools.partial(function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, call)
