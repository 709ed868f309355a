"""The running service: port, model, signals.

The port is bound first and answers /health while the model loads. The first SIGTERM or SIGINT
refuses new requests and lets running ones end; a second ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import uvicorn

from offramp import __version__
from offramp.server import logs
from offramp.server.api.context import Context
from offramp.server.app import create_app
from offramp.server.config import ServerConfig
from offramp.server.engine.driver import EngineDriver, EngineState
from offramp.server.engine.request import EngineInfo, EngineOutput
from offramp.server.engine.workers import ProcessWorker, ThreadWorker, Worker
from offramp.server.errors import EngineFailed
from offramp.server.http_protocol import counting
from offramp.server.keys import ApiKeyError, is_loopback
from offramp.server.load import load_engine, settle_memory
from offramp.server.metrics import Metrics
from offramp.server.options import non_defaults
from offramp.server.text.grammars import GrammarError
from offramp.server.text.tokenizer import Tokenizer
from offramp.server.tracing import TracingError

logger = logging.getLogger("offramp.server")

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
# How long the engine's last step may take when the server stops.
_STEP_PATIENCE_S: Final = 10.0
# For writing the last frames once the engine is done.
_FLUSH_S: Final = 5
# Longer than clients and load balancers keep idle connections (5 and 60 s), so that they close
# first and never send a request into a connection that is being closed.
_KEEP_ALIVE_S: Final = 75


def run(config: ServerConfig) -> int:
    """Serve until a signal; returns the exit status."""
    logs.setup(config.uvicorn_log_level)
    _raise_file_limit()
    fault = tls_fault(config)
    if fault is not None:
        return _refused(fault)
    try:
        listener = bind(config.host, config.port)
    except OSError as error:
        return _refused(bind_message(config, error))
    try:
        service = Service(config, listener)
    except (ApiKeyError, TracingError) as error:
        listener.close()
        return _refused(str(error))
    logger.info("offramp %s, options %s", __version__, non_defaults(config) or "all default")
    with asyncio.Runner(loop_factory=service.server.config.get_loop_factory()) as runner:
        return runner.run(service.run())


def _refused(reason: str) -> int:
    """Say why the server does not start; its exit status."""
    sys.stderr.write(f"offramp serve: error: {reason}\n")
    return 1


def bind(host: str, port: int) -> socket.socket:
    """A socket listening on ``host`` and ``port``; raises OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


class Service:
    """One server process from start to exit."""

    def __init__(self, config: ServerConfig, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener
        self._stats = logs.StatsLog()
        self._folder = Path()
        self._metrics = Metrics(config.model_names((config.engine.model,))[0])
        self._driver = EngineDriver(
            self._worker,
            self._observe,
            max_waiting=config.max_num_queued_reqs,
            max_waiting_tokens=config.max_num_queued_tokens,
            restarts=config.engine.engine_restarts,
            step_timeout=config.engine.step_timeout,
        )
        self._context = Context(self._driver, config, self._metrics)
        self._stop_task: asyncio.Task[None] | None = None
        self._status = 0
        self._announced = False
        self.server = _Server(
            uvicorn.Config(
                create_app(self._context),
                lifespan="off",
                log_config=None,
                log_level=config.uvicorn_log_level,
                access_log=False,
                http=counting(self._metrics.refused),
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )
        self._context.connections = self.server.server_state.connections

    async def run(self) -> int:
        """Load and serve; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        logger.info("listening on %s", self._address())
        if not self._context.keys and not is_loopback(self._listener.getsockname()[0]):
            logger.warning("no API key: whoever reaches this address may use the server")
        tasks = (
            asyncio.create_task(self._context.keys.watch()),
            asyncio.create_task(self._load()),
            asyncio.create_task(self._stats.run(self._config.log_stats_interval)),
            asyncio.create_task(self._watch()),
            asyncio.create_task(self._metrics.watch_lag()),
        )
        await self.server.serve(sockets=[self._listener])
        if self._driver.state is EngineState.LOADING:
            # Neither a download nor a tokenizer that loads can be interrupted, only left behind.
            _exit_now(self._status)
        patience = 0.0 if self._driver.state is EngineState.FAILED else _STEP_PATIENCE_S
        if not await self._driver.stop(patience):
            # Nor can a step that hangs on a thread.
            _exit_now(self._status)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        logger.info("stopped")
        return 1 if self._driver.state is EngineState.FAILED else self._status

    async def _load(self) -> None:
        try:
            info = await self._loaded()
        except asyncio.CancelledError:
            raise
        except EngineFailed:
            logger.debug("the engine was not built")
        except Exception as error:
            logger.debug("loading failed", exc_info=error)
            self._give_up(str(error) or type(error).__name__)
        else:
            self._announce(info)

    async def _loaded(self) -> EngineInfo:
        self._folder = await asyncio.to_thread(self._resolve)
        if self._config.engine_worker == "process":
            _do_without_torch()
        # The engine loads the weights meanwhile.
        self._driver.start()
        self._context.tokenizer = await asyncio.to_thread(
            Tokenizer.load,
            self._folder,
            special_in_messages=self._config.special_tokens_in_messages,
        )
        info = await self._driver.ready()
        self._metrics.configure(info)
        self._stats.configure(info.num_layers)
        # It holds the interpreter for a quarter of a second, which the first answer with a form
        # would have all others wait for.
        await asyncio.to_thread(self._load_grammars)
        await asyncio.to_thread(settle_memory)
        return info

    def _load_grammars(self) -> None:
        try:
            self._context.grammars.native()
        except GrammarError as error:
            logger.warning("answers cannot be held to a form: %s", error)

    def _resolve(self) -> Path:
        """Folder of the model, fetched if need be; runs on a worker thread."""
        # The port and its probes need not wait for what it takes with it.
        from offramp.models.loading.sources import resolve  # noqa: PLC0415

        return resolve(self._config.engine.model, revision=self._config.engine.revision)

    def _worker(self) -> Worker:
        build = partial(load_engine, self._config, self._folder)
        process = self._config.engine_worker == "process"
        return ProcessWorker(build) if process else ThreadWorker(build)

    def _observe(self, output: EngineOutput) -> None:
        self._metrics.observe(output)
        self._stats.observe(output)

    async def _watch(self) -> None:
        """End the server when its engine is gone for good: whoever started it starts another."""
        await self._driver.failed.wait()
        reason = self._driver.failure or "unknown"
        if not self._announced:
            self._give_up(reason)
            return
        logger.error("the engine is gone: %s", reason)
        self._status = 1
        self.server.should_exit = True

    def _give_up(self, reason: str) -> None:
        told = " ".join(reason.split())
        logger.error("cannot load %s: %s", self._config.engine.model, told)
        self._status = 1
        self.server.should_exit = True

    def _announce(self, info: EngineInfo) -> None:
        tokens = info.num_blocks * info.block_size
        exits = ", ".join(map(str, info.exit_layers)) or "none"
        exits += ", a draft head" if info.draft_head else ""
        logger.info(
            "%s: %s, %d layers, exits after %s; KV cache %d tokens, maximum concurrency for %d "
            "tokens per request: %.2fx",
            *(self._context.model_name, info.dtype, info.num_layers, exits),
            *(tokens, info.max_model_len, tokens / info.max_model_len),
        )
        logger.info("ready on %s", self._address())
        self._announced = True

    def _address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if self._config.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def _on_signal(self, number: int) -> None:
        if self._stop_task is not None:
            logger.warning("second signal, stopping at once")
            # What a shell reports for a program ended by this signal.
            _exit_now(128 + number)
        self._stop_task = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        if self._driver.state is not EngineState.LOADING:
            count, grace = self._driver.num_requests, self._config.shutdown_timeout
            logger.info("stopping: %d running requests have %.0f s to end", count, grace)
            if not await self._driver.drain(grace):
                logger.warning("%d requests did not end in time", self._driver.num_requests)
            if not await self._driver.stop(_STEP_PATIENCE_S):
                logger.warning("the engine's last step did not end")
        self.server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would close streams that may still end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _exit_now(status: int) -> NoReturn:
    """End the process without waiting for threads."""
    logging.shutdown()
    os._exit(status)


def _do_without_torch() -> None:
    """Keep transformers from importing torch for its tokenizers: it takes 350 MB and seconds."""
    if "torch" not in sys.modules:
        # To Python, a module that cannot be found.
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


def _raise_file_limit() -> None:
    """Allow as many open connections as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        # Some systems name a hard limit they do not grant; the soft one then stays.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def tls_fault(config: ServerConfig) -> str | None:
    """Why HTTPS cannot be served as configured; None if it can, or is not wished."""
    certificate, key = config.ssl_certfile, config.ssl_keyfile
    if certificate is None:
        return "--ssl-keyfile needs --ssl-certfile" if key is not None else None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        reason = error.strerror or error
        return f"cannot use --ssl-certfile {certificate} with its key: {reason}"
    return None


def bind_message(config: ServerConfig, error: OSError) -> str:
    """Why the port cannot be listened on, and what would work."""
    where = f"port {config.port} on {config.host}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program; choose another with --port"
    return f"cannot listen on {where}: {error.strerror or error}"
