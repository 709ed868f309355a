"""The process that renders chat templates: ``python -m offramp.server.text.render_worker FD``.

A template is a program of the model's author, and nothing in Python bounds the time or the memory
of one. Here the system does: a child of this process renders, with a timer of processor time and a
limit of memory, and one that goes past them is ended and replaced. This process imports what
transformers renders with once, so that the next child is there in a millisecond.

A request is a pickle of its number, the template and what it is rendered with. A reply is the
number, a `Reply` and a text, never a pickle: templates may be hostile, and so what has run them.
"""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NoReturn

CPU_SECONDS: Final = 2.0
"""Processor time of one conversation; ten thousand messages take a twentieth."""
MEMORY_MIB: Final = 512
"""Memory of one conversation, beside what the process has anyway."""
LONGEST: Final = 2**24
"""Characters of a rendered text; the longest contexts hold less."""
_OUT_OF_MEMORY: Final = 3
_UNICODE: Final = "surrogatepass"
_NUMBER_BYTES: Final = 8
_HEAD_BYTES: Final = _NUMBER_BYTES + 1


class Reply(bytes, Enum):
    """How a conversation fared; a byte before the text."""

    TEXT = b"t"
    REFUSED = b"r"
    PAST_LIMITS = b"l"


def main() -> None:
    """Render what comes over the descriptor in the arguments until it is closed."""
    connection = Connection(int(sys.argv[1]))
    # In the wheel of transformers this takes no torch with it.
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

    gc.freeze()
    # The number of the request that the child renders, 0 while it does not.
    rendering = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    while True:
        child = os.fork()
        if not child:
            _run_child(connection, rendering, render_jinja_template)
        _, status = os.waitpid(child, 0)
        number = rendering[0]
        if not number:
            # The server has gone, or somebody ended the child while a reply was on its way.
            return
        rendering[0] = 0
        with suppress(OSError):
            send(connection, number, Reply.PAST_LIMITS, _reason(status))


def send(connection: Connection, number: int, reply: Reply, text: str) -> None:
    """Send the reply to a request; raises OSError where nobody reads."""
    head = number.to_bytes(_NUMBER_BYTES, "little") + reply.value
    connection.send_bytes(head + text.encode("utf-8", _UNICODE))


def receive(connection: Connection) -> tuple[int, Reply, str]:
    """A reply and its request's number; raises EOFError, OSError or ValueError without one."""
    message = connection.recv_bytes(4 * LONGEST + _HEAD_BYTES)
    number = int.from_bytes(message[:_NUMBER_BYTES], "little")
    reply = Reply(message[_NUMBER_BYTES:_HEAD_BYTES])
    return number, reply, message[_HEAD_BYTES:].decode("utf-8", _UNICODE)


def _run_child(*args: Any) -> NoReturn:
    """Serve, and leave without what the parent would do at its end."""
    try:
        _serve(*args)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException:  # noqa: BLE001 (the child ends here)
        os._exit(os.EX_SOFTWARE)
    os._exit(os.EX_OK)


def _serve(
    connection: Connection,
    rendering: memoryview[int],
    render: Callable[..., tuple[list[str], object]],
) -> None:
    _limit_memory()
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        number, template, messages, options = pickle.loads(request)  # noqa: S301 (the server's)
        rendering[0] = number
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        reply, text = Reply.REFUSED, ""
        try:
            (text,), _ = render(conversations=[messages], chat_template=template, **options)
            reply = Reply.TEXT
            if len(text) > LONGEST:
                reply, text = Reply.PAST_LIMITS, f"wrote more than {LONGEST} characters"
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a template raises is its refusal)
            text = (str(error) or type(error).__name__)[:1000]
        signal.setitimer(signal.ITIMER_PROF, 0)
        rendering[0] = 0
        with suppress(OSError):
            send(connection, number, reply, text)


def _limit_memory() -> None:
    # Where the system does not tell what the process has, the limit takes that in.
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + MEMORY_MIB * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reason(status: int) -> str:
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGPROF:
            return f"took more than {CPU_SECONDS:g} s of processor time"
        return f"ended its process ({signal.Signals(os.WTERMSIG(status)).name})"
    if os.WEXITSTATUS(status) == _OUT_OF_MEMORY:
        return f"took more than {MEMORY_MIB} MiB of memory"
    return "ended its process"


if __name__ == "__main__":
    main()
