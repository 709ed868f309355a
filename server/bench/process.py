"""Servers as processes of their own, which end with the one that started them.

Run as a program this module is such a server: ``python -m offramp.server.bench.process offramp``
with the words of ``offramp serve``, or ``llamacpp`` or ``vllm`` with those of _serve_llamacpp and
_serve_vllm. It imports neither torch nor transformers, or they would count as memory that llama.cpp
needs.
"""

from __future__ import annotations

import http
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue

import offramp
from offramp.server.bench.common import BenchError

SERVE_OFFRAMP = ("offramp.server.bench.process", "offramp")
SERVE_LLAMACPP = ("offramp.server.bench.process", "llamacpp")
SERVE_VLLM = ("offramp.server.bench.process", "vllm")

_START_S = 300.0
_STOP_S = 10.0
_READY = re.compile(r"ready on (http://\S+)")
_KEPT_LINES = 15
# Where the package lies, which need not be installed.
_ROOT = Path(offramp.__file__).parents[1]
# llama.cpp's warnings and errors; a line for every request would cost time.
_WARNINGS = 2


class ServerProcess:
    """A started server; its output is read on a thread so that it never blocks the server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._address: Queue[str | None] = Queue()
        self._last: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def address(self, timeout: float = _START_S) -> str:
        """Where it serves, once it says so; raises BenchError after ``timeout`` seconds."""
        try:
            address = self._address.get(timeout=timeout)
        except Empty:
            raise BenchError(f"a server was not ready within {timeout:.0f} s") from None
        if address is None:
            raise BenchError("a server ended before it was ready:\n" + "".join(self._last).rstrip())
        return address

    def peak_memory_mib(self) -> float | None:
        """Largest resident sizes so far of all its processes; None on systems without /proc.

        What they share counts for each.
        """
        try:
            sizes = [_peak_kib(process) for process in _family(self._process.pid)]
        except OSError:
            return None
        return round(sum(sizes) / 1024, 1)

    def stop(self) -> None:
        """End it: by closing the pipe it watches, or by force."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_STOP_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._last.append(line)
                found = _READY.search(line)
                if found:
                    self._address.put(found[1])
        self._address.put(None)


@contextmanager
def serving(module: str, *words: str) -> Iterator[ServerProcess]:
    """``python -m module words``, a server that calls ``follow_parent``; stopped at the end."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(  # noqa: S603 (this interpreter and modules of ours)
        [sys.executable, "-m", module, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    )
    server = ServerProcess(process)
    try:
        yield server
    finally:
        server.stop()


def _family(process: int) -> Iterator[int]:
    """A process and those it started, as Linux lists them; raises OSError elsewhere."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text(encoding="ascii").split():
            yield from _family(int(child))


def _peak_kib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


def follow_parent(child: subprocess.Popen[bytes] | None = None) -> None:
    """End this process when its standard input closes, which even a killed parent's does.

    With it ends ``child``, started as the leader of a session, and all that it started.
    """

    def wait() -> None:
        # Not through sys.stdin, whose lock a thread that waits would hold while Python ends.
        while os.read(0, 1):
            pass
        if child is not None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _serve_offramp(words: Sequence[str]) -> None:
    from offramp.server import cli  # noqa: PLC0415

    sys.exit(cli.main(["serve", *words]))


def _serve_llamacpp(words: Sequence[str]) -> None:
    """llama.cpp's own server; the address is printed once the model is loaded.

    Words: model file, threads, answers at once, tokens of each.
    """
    gguf, (threads, slots, context) = words[0], map(int, words[1:])
    import xllamacpp  # noqa: PLC0415

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = True
    params.verbosity = _WARNINGS
    # No copies of slots beside the K,V, and no shrinking of the context that was set.
    params.cache_ram_mib = 0
    params.fit_params = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"ready on {server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


def _serve_vllm(words: Sequence[str]) -> None:
    """The server of vLLM, as a child of this process; the address is printed once it is healthy.

    Words: the Python that has vLLM, threads, and words for its server.
    """
    python, threads, *options = words
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    child = subprocess.Popen(  # noqa: S603 (the user names the interpreter)
        [*command, "--port", str(port), "--disable-log-stats", *options],
        stdin=subprocess.DEVNULL,
        env={
            **os.environ,
            # A core for each thread, none kept for its front end, and no look at the network.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        start_new_session=True,
    )
    follow_parent(child)
    while not _healthy(url):
        if child.poll() is not None:
            sys.exit(f"vLLM ended with status {child.returncode}")
        time.sleep(1)
    sys.stdout.write(f"ready on {url}\n")
    sys.stdout.flush()
    sys.exit(child.wait())


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:  # noqa: S310 (http, ours)
            return bool(reply.status == http.HTTPStatus.OK)
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


if __name__ == "__main__":
    if sys.argv[1] != "vllm":
        follow_parent()
    serve = {"offramp": _serve_offramp, "llamacpp": _serve_llamacpp, "vllm": _serve_vllm}
    serve[sys.argv[1]](sys.argv[2:])
