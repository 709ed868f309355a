"""The engine's own process: ``python -m offramp.server.engine.engine_process DESCRIPTOR``.

The descriptor is its end of the socket pair that workers.py made. It ends when told to, when its
engine fails, and when the server is gone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

from offramp.server import logs
from offramp.server.engine.frames import (
    Beat,
    Ending,
    Request,
    RequestReader,
    frame,
    output_frame,
    receive,
)
from offramp.server.engine.loop import EngineLoop, Report, ended
from offramp.server.engine.request import EngineInfo, FinishReason
from offramp.server.errors import EngineConfigError

logger = logging.getLogger("offramp.engine")

_BEAT_S = 0.25
# Outputs that the server has not read yet, before the engine waits for it.
_BUFFER_BYTES = 4 << 20
_PR_SET_PDEATHSIG = 1


class EngineProcess:
    """One engine, and the connection to its server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._requests = RequestReader()
        self._loop = EngineLoop(self._report)
        self._built = False

    def run(self) -> int:
        """Build the engine and serve until told to end; returns the exit status."""
        build, level = receive(self._connection)
        logs.setup("warning")
        logging.getLogger("offramp").setLevel(level)
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        try:
            self._loop.run(build)
        except EngineConfigError as error:
            # The configuration is at fault, so a traceback would not help.
            logger.debug("engine refused", exc_info=error)
            self._send(frame(Ending(str(error), misconfigured=True)))
        except BaseException as error:
            level = logging.ERROR if self._built else logging.DEBUG
            logger.log(level, "the engine failed", exc_info=error)
            self._send(frame(Ending(f"{type(error).__name__}: {error}", misconfigured=False)))
        else:
            return 0
        return 1

    def _report(self, report: Report) -> None:
        if isinstance(report, EngineInfo):
            self._built = True
            self._send(frame(report))
        else:
            self._send(output_frame(report))

    def _send(self, data: bytes) -> None:
        """Write a frame; where the server is gone, `_read` sees that and ends this process."""
        with self._sending, suppress(ConnectionError):
            self._connection.sendall(data)

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(_BEAT_S):
            self._send(frame(Beat(self._loop.stuck_for)))

    def _read(self) -> None:
        try:
            while (message := receive(self._connection)) is not None:
                self._take(message)
        except Exception as error:
            # A step under way has nobody to tell its tokens to.
            logger.debug("the connection to the server ended", exc_info=error)
            os._exit(0 if isinstance(error, EOFError | ConnectionError) else 1)
        self._loop.stop()

    def _take(self, message: Any) -> None:
        if not isinstance(message, Request):
            self._loop.post(message)
            return
        try:
            item = self._requests.read(message)
        except Exception:
            logger.exception("a request cannot be read")
            fault = "The request could not be handed to the engine."
            self._send(output_frame([ended(message.request_id, FinishReason.ERROR, fault)]))
        else:
            self._loop.post(item)


def _follow_server() -> None:
    """End with the server, and only with it: signals to the whole group are its business."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(descriptor: int) -> int:
    """Run on the socket of ``descriptor``; returns the exit status."""
    _follow_server()
    faulthandler.enable()
    # Open until this process ends, as its threads use it until then.
    connection = socket.socket(fileno=descriptor)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return EngineProcess(connection).run()


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    logging.shutdown()
    # What a library left running, or waits for at the end, must not keep the process.
    os._exit(status)
