"""What the routes of one application share."""

import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from offramp.server.api.deciding import PriorCache
from offramp.server.config import ServerConfig
from offramp.server.engine.driver import EngineDriver, EventSink, TokenStream
from offramp.server.engine.request import DecisionRequest, GenerationRequest
from offramp.server.errors import EngineLoading, InvalidRequest, ModelNotFound, QueueFull
from offramp.server.keys import ApiKeys, check_shares
from offramp.server.metrics import Metrics
from offramp.server.text.grammars import GrammarCompiler
from offramp.server.text.tokenizer import Tokenizer
from offramp.server.tracing import Tracing


@dataclass(slots=True)
class Context:
    """State of one application.

    ``tokenizer`` appears once the model folder was read; ``busy_since`` is when, on the monotonic
    clock, the engine last got work after having had none; ``in_flight`` counts requests to the
    model that wait for the rest of their answer; ``connections`` are those of clients. Raises
    ApiKeyError where the keys cannot be used, TracingError where spans cannot be sent.
    """

    driver: EngineDriver
    config: ServerConfig
    metrics: Metrics
    tokenizer: Tokenizer | None = None
    in_flight: int = 0
    connections: Collection[object] = ()
    busy_since: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    priors: PriorCache = field(default_factory=PriorCache)
    keys: ApiKeys = field(init=False)
    seeds: random.Random = field(init=False)
    tracing: Tracing | None = field(init=False)
    _grammars: GrammarCompiler | None = None

    def __post_init__(self) -> None:
        self.keys = ApiKeys(self.config.api_key, self.config.api_key_file)
        check_shares(self.keys, self.config.max_requests_per_key)
        endpoint = self.config.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint)
        # Seeds only have to differ; with --seed a restarted server repeats its answers.
        self.seeds = random.Random(self.config.engine.seed)  # noqa: S311

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names clients may use, the reported one first."""
        return self.config.model_names((self.config.engine.model,))

    @property
    def model_name(self) -> str:
        """The name responses report."""
        return self.model_names[0]

    def check_model(self, name: str | None, *, optional: bool = False) -> None:
        """Raise ModelNotFound unless ``name`` is ours; None takes the only model.

        Raises InvalidRequest for None where the server wants a name, unless that is ``optional`` on
        the route.
        """
        if name is None and self.config.require_model and not optional:
            raise InvalidRequest(
                "'model' is required.", param="model", code="missing_required_parameter"
            )
        if name is not None and name not in self.model_names:
            raise ModelNotFound(
                f"This server does not serve that model; it serves {self.model_name!r}.",
                param="model",
            )

    def timeout(self, asked: float | None = None) -> float | None:
        """Seconds that an answer may take: the server's bound, or what was ``asked`` if less."""
        bounds = [bound for bound in (asked, self.config.request_timeout) if bound is not None]
        return min(bounds, default=None)

    def submit(
        self, request: GenerationRequest | DecisionRequest, sink: EventSink | None = None
    ) -> TokenStream:
        """Queue a request as the driver does; raises what that raises."""
        if not self.driver.num_requests:
            self.busy_since = time.monotonic()
        try:
            return self.driver.submit(request, sink)
        except QueueFull:
            full = self.driver.num_requests >= self.driver.capacity
            self.metrics.rejected("max_num_queued_reqs" if full else "max_num_queued_tokens")
            raise

    @property
    def grammars(self) -> GrammarCompiler:
        """The compiler of answers' grammars; raises what keeps the server from taking requests."""
        if self._grammars is None:
            tokenizer, info = self.loaded_tokenizer(), self.driver.info
            self._grammars = GrammarCompiler(tokenizer, info.vocab_size, self.end_tokens)
        return self._grammars

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the model's configuration, and the tokenizer's."""
        own = self.loaded_tokenizer().end_tokens
        return tuple(dict.fromkeys((*self.driver.info.eos_token_ids, *own)))

    def loaded_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises what keeps the server from taking requests."""
        # The engine's own state comes first: it tells a failed load from a running one.
        _ = self.driver.info
        if self.tokenizer is None:
            raise EngineLoading("The model is being loaded.", headers={"Retry-After": "2"})
        return self.tokenizer


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Shared = Annotated[Context, Depends(_context)]
