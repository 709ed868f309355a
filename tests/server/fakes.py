"""An engine with scripted answers, and a server around it on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from openai import AsyncOpenAI
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from offramp.models.sampling_params import TokenSource
from offramp.models.step import TokenLogprobs
from offramp.server.api.context import Context
from offramp.server.app import create_app
from offramp.server.config import EngineConfig, ServerConfig
from offramp.server.engine.driver import EngineDriver
from offramp.server.engine.loop import EngineRequest
from offramp.server.engine.request import (
    EngineInfo,
    EngineOutput,
    FinishReason,
    GenerationRequest,
    RequestStats,
    StepStats,
    TokenEvent,
)
from offramp.server.engine.workers import ThreadWorker
from offramp.server.http_protocol import counting
from offramp.server.metrics import Metrics
from offramp.server.serve import bind
from offramp.server.text.tokenizer import Tokenizer

MODEL = "fake"
END = 0
NUM_LAYERS = 4
EXITS = (2,)
CONTEXT = 256
# Long enough for any step of a test, short enough to end a hanging one.
PATIENCE_S = 20.0
# How long the fake engine waits for a permit before it looks at aborts again.
_TICK_S = 0.005


def byte_backend() -> Backend:
    """One token per byte, id 0 ends a text."""
    tokens = ["<end>", *sorted(ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return backend


def render(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """A chat template that refuses one word, and writes down the options it was given."""
    if any(message["content"] == "refuse me" for message in messages):
        raise ValueError("the template refuses")
    head = "".join(f"[{name}={options[name]}]" for name in sorted(options))
    return head + "".join(f"{message['role']}:{message['content']}\n" for message in messages)


def fake_logprobs(token: int, top: int) -> TokenLogprobs:
    """The token is the best one, those with the next ids follow."""
    best = tuple((token + place, -0.25 - place) for place in range(top))
    return TokenLogprobs(-0.25, 1, best)


@dataclass(slots=True)
class _Slot:
    request: GenerationRequest
    stats: RequestStats


@dataclass
class FakeEngine:
    """Gives every request the text ``reply``, a token a step, then the end token.

    ``permits`` bounds the tokens it may give until more are released; None is no bound. With
    ``ignore_eos`` the reply repeats. Tokens leave after layers 2 and 4 in turn.
    """

    reply: str = "Hello, world!"
    permits: int | None = None
    fail_at: int | None = None
    context: int = CONTEXT
    coarse: bool = False
    info: EngineInfo = field(init=False)
    aborted: list[str] = field(default_factory=list)
    added: list[GenerationRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        backend = byte_backend()
        self._ids = backend.encode(self.reply).ids
        self._slots: dict[str, _Slot] = {}
        self._allowed = threading.Semaphore(self.permits or 0)
        self.abort_seen = threading.Event()
        self._arrived = threading.Semaphore(0)
        self._given = 0
        self.info = EngineInfo(
            model_name=MODEL,
            num_layers=NUM_LAYERS,
            exit_layers=EXITS,
            exit_thresholds=(0.9,),
            vocab_size=backend.get_vocab_size(),
            max_model_len=self.context,
            block_size=16,
            num_blocks=64,
            max_num_seqs=4,
            dtype="float32",
            eos_token_ids=(END,),
        )

    def release(self, tokens: int) -> None:
        """Let it give ``tokens`` more."""
        self._allowed.release(tokens)

    async def arrivals(self, count: int) -> None:
        """Wait until ``count`` more requests are in the engine."""
        for _ in range(count):
            assert await asyncio.to_thread(self._arrived.acquire, timeout=PATIENCE_S)

    def add(self, request: EngineRequest, submitted_at: float) -> None:
        assert isinstance(request, GenerationRequest)
        self.added.append(request)
        now = time.monotonic()
        stats = RequestStats(
            submitted_at,
            admitted_at=now,
            prompt_tokens=len(request.prompt),
            coarse=self.coarse,
        )
        self._slots[request.request_id] = _Slot(request, stats)
        self._arrived.release()

    def abort(self, request_id: str) -> None:
        if self._slots.pop(request_id, None) is not None:
            self.aborted.append(request_id)
            self.abort_seen.set()

    @property
    def has_work(self) -> bool:
        return bool(self._slots)

    def step(self) -> EngineOutput:
        events = [event for slot in list(self._slots.values()) if (event := self._next(slot))]
        return EngineOutput(tuple(events), self._stats(len(events))) if events else EngineOutput()

    def _next(self, slot: _Slot) -> TokenEvent | None:
        if self.permits is not None and not self._allowed.acquire(timeout=_TICK_S):
            return None
        if self.fail_at is not None and self._given >= self.fail_at:
            raise RuntimeError("the fake engine was told to fail")
        self._given += 1
        request, index = slot.request, slot.stats.generated_tokens
        token, reason = self._token(request, index)
        layer = (2, 4)[index % 2]
        slot.stats = slot.stats._replace(
            generated_tokens=index + 1,
            layers_executed=slot.stats.layers_executed + layer,
            first_token_at=slot.stats.first_token_at or time.monotonic(),
        )
        if reason is not None:
            del self._slots[request.request_id]
        scored, first = request.sampling.logprobs, not index
        wanted = request.sampling.prompt_logprobs if first else None
        return TokenEvent(
            request.request_id,
            (token,),
            (layer,),
            slot.stats,
            reason,
            logprobs=() if scored is None else (fake_logprobs(token, scored),),
            prompt_logprobs=tuple(
                fake_logprobs(known, wanted) for known in request.prompt[1:] if wanted is not None
            ),
            sources=() if index % 2 else (TokenSource.NGRAM,),
        )

    def _token(self, request: GenerationRequest, index: int) -> tuple[int, FinishReason | None]:
        endless = END not in request.sampling.stop_token_ids
        token = self._ids[index % len(self._ids)] if endless or index < len(self._ids) else END
        if token in request.sampling.stop_token_ids:
            return token, FinishReason.STOP
        full = index + 1 >= request.sampling.max_tokens
        return token, FinishReason.LENGTH if full else None

    def _stats(self, rows: int) -> StepStats:
        return StepStats(
            kind="segments",
            segment=0,
            seconds=0.001,
            host_seconds=0.0001,
            prefill_rows=0,
            decode_rows=rows,
            layers_executed=2 * rows,
            running=len(self._slots),
            waiting=0,
            kv_used_blocks=len(self._slots),
            kv_total_blocks=self.info.num_blocks,
            debt_tokens=0,
            segment_queue=(rows, 0),
        )


@dataclass(frozen=True, slots=True)
class Running:
    """A server that takes requests."""

    engine: FakeEngine
    context: Context
    url: str
    client: AsyncOpenAI


class _Server(uvicorn.Server):
    """uvicorn that tells when it listens and leaves signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def config(**options: object) -> ServerConfig:
    """Configuration of a server under test."""
    engine = EngineConfig(model=MODEL)
    return ServerConfig.model_validate({"port": 0, **options, "engine": engine})


def make_context(engine: FakeEngine, options: ServerConfig) -> Context:
    """What the application of ``engine`` shares; the driver is not started."""
    metrics = Metrics(MODEL)
    driver = EngineDriver(
        lambda: ThreadWorker(lambda: engine),
        metrics.observe,
        max_waiting=options.max_num_queued_reqs,
    )
    return Context(driver, options, metrics, Tokenizer(byte_backend(), render))


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine | None = None, **options: object) -> AsyncIterator[Running]:
    """A server around ``engine`` on a free port of this machine."""
    engine = engine or FakeEngine()
    context = make_context(engine, config(**options))
    context.driver.start()
    context.metrics.configure(await context.driver.ready())
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    settings = uvicorn.Config(
        create_app(context),
        lifespan="off",
        log_config=None,
        access_log=False,
        http=counting(context.metrics.refused),
    )
    server = _Server(settings)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await server.listening.wait()
    url = f"http://127.0.0.1:{port}"
    try:
        # Without retries every answer is seen.
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield Running(engine, context, url, client)
    finally:
        await context.driver.stop()
        server.should_exit = True
        await asyncio.wait_for(task, PATIENCE_S)
        listener.close()
