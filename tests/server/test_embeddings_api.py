"""POST /v1/embeddings, with the tiny model behind it."""

from __future__ import annotations

import array
import asyncio
import base64
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from offramp.models.config import Weights
from offramp.models.step import Pooling, Step, StepResult
from offramp.server.api.embeddings import MAX_INPUTS, as_base64, shortened
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine, runner_of
from offramp.server.text.tokenizer import Tokenizer
from tests.server.deciding import Recorder, ids_of, post, refusal, serve, tiny_engine
from tests.server.fakes import CONTEXT, MODEL, PATIENCE_S, Running

PATH = "/v1/embeddings"
WIDTH = 64
TEXTS = ["A cat.", "A cat in a hat sat on a mat, and then it went away.", "Ä"]

Embed = Callable[[Sequence[int], str], list[float]]


@pytest.fixture
def engine(tiny_dir: Path) -> Recorder:
    return tiny_engine(tiny_dir)


@pytest.fixture(scope="module")
def theirs(tiny_dir: Path) -> Embed:
    """Transformers' states behind the final norm, pooled."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()

    @torch.inference_mode()
    def embed(ids: Sequence[int], pooling: str) -> list[float]:
        states = model.model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]
        found: list[float] = (states.mean(0) if pooling == "mean" else states[-1]).tolist()
        return found

    return embed


def unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector]


async def vectors(server: Running, texts: Any, **options: Any) -> list[list[float]]:
    response = await post(server, PATH, input=texts, **options)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return [each["embedding"] for each in data]


async def test_the_answer_has_openais_form(engine: Recorder) -> None:
    async with serve(engine) as server:
        response = await post(server, PATH, input=TEXTS, model=MODEL, user="somebody")
    found = response.json()
    tokens = sum(len(ids_of(text)) for text in TEXTS)
    assert list(found) == ["object", "data", "model", "usage"]
    assert (found["object"], found["model"]) == ("list", MODEL)
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    for index, each in enumerate(found["data"]):
        assert list(each) == ["object", "index", "embedding"]
        assert (each["object"], each["index"]) == ("embedding", index)
        assert len(each["embedding"]) == WIDTH
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_vectors_are_transformers_states(
    engine: Recorder,
    theirs: Embed,
    pooling: str,
    normalize: bool,  # noqa: FBT001 (parametrised)
) -> None:
    async with serve(engine) as server:
        found = await vectors(server, TEXTS, pooling=pooling, normalize=normalize)
    for text, vector in zip(TEXTS, found, strict=True):
        wanted = theirs(ids_of(text), pooling)
        wanted = unit(wanted) if normalize else wanted
        assert vector == pytest.approx(wanted, abs=1e-4)


async def test_the_server_says_how_to_pool(engine: Recorder, theirs: Embed) -> None:
    async with serve(engine, embedding_pooling="last") as server:
        (own,) = await vectors(server, TEXTS[1])
        (other,) = await vectors(server, TEXTS[1], pooling="mean")
    assert own == pytest.approx(unit(theirs(ids_of(TEXTS[1]), "last")), abs=1e-4)
    assert other == pytest.approx(unit(theirs(ids_of(TEXTS[1]), "mean")), abs=1e-4)


async def test_all_forms_of_an_input_say_the_same(engine: Recorder) -> None:
    text = TEXTS[0]
    async with serve(engine) as server:
        forms = [
            await vectors(server, each) for each in (text, [text], ids_of(text), [ids_of(text)])
        ]
        special = await vectors(server, text, add_special_tokens=False)
    for found in (*forms, special):
        assert found == [pytest.approx(forms[0][0], abs=1e-6)]


async def test_a_vector_does_not_depend_on_its_company(engine: Recorder) -> None:
    """Nor on what is cached: the same again, together and in another order."""
    texts = [*TEXTS, TEXTS[1] + " And then?", TEXTS[1] + " And now?", TEXTS[1]]
    async with serve(engine) as server:
        alone = [(await vectors(server, text))[0] for text in texts]
        together = await vectors(server, texts)
        again = await vectors(server, texts[::-1])
        reads = [len(request.reads) for request in engine.added]
    assert reads == [1] * len(texts) + [len(texts)] * 2
    for one, other, third in zip(alone, together, again[::-1], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
        assert one == pytest.approx(third, abs=1e-5)


async def test_base64_is_the_same_in_little_endian(engine: Recorder) -> None:
    async with serve(engine) as server:
        plain = await vectors(server, TEXTS)
        coded: list[Any] = await vectors(server, TEXTS, encoding_format="base64")
    for own, text in zip(plain, coded, strict=True):
        packed = base64.b64decode(text, validate=True)
        assert len(packed) == 4 * WIDTH
        tensor = torch.frombuffer(bytearray(packed), dtype=torch.float32)
        assert tensor.tolist() == pytest.approx(own, abs=1e-6)


def test_base64_of_known_numbers() -> None:
    packed = base64.b64decode(as_base64(array.array("f", [1.0, -2.0])))
    assert packed == bytes.fromhex("0000803f000000c0")


async def test_the_official_client_reads_both_formats(engine: Recorder) -> None:
    async with serve(engine) as server:
        create = server.client.embeddings.create
        usual = await create(model=MODEL, input=TEXTS)
        plain = await create(model=MODEL, input=TEXTS, encoding_format="float", dimensions=8)
    assert usual.usage.total_tokens == usual.usage.prompt_tokens > 0
    for own, short in zip(usual.data, plain.data, strict=True):
        assert len(own.embedding) == WIDTH
        assert short.embedding == pytest.approx(unit(own.embedding[:8]), abs=1e-5)


async def test_fewer_dimensions_are_the_first_ones(engine: Recorder) -> None:
    async with serve(engine) as server:
        (whole,) = await vectors(server, "A cat.", normalize=False)
        (short,) = await vectors(server, "A cat.", dimensions=5)
        (raw,) = await vectors(server, "A cat.", dimensions=WIDTH, normalize=False)
    assert short == pytest.approx(unit(whole[:5]), abs=1e-5)
    assert raw == pytest.approx(whole, abs=1e-5)


def test_nothing_has_no_direction() -> None:
    assert shortened((0.0, 0.0), None, normalize=True).tolist() == [0.0, 0.0]
    assert shortened((3.0, 4.0, 9.0), 2, normalize=True).tolist() == pytest.approx([0.6, 0.8])


async def test_many_inputs_are_answered_in_order(engine: Recorder, theirs: Embed) -> None:
    """More than the engine has blocks for at once."""
    texts = [[3 + index % 200, 4 + index // 200, 7] for index in range(MAX_INPUTS)]
    async with serve(engine) as server:
        found = await vectors(server, texts)
    assert len(found) == MAX_INPUTS
    for index in (0, 1, 1023, MAX_INPUTS - 1):
        assert found[index] == pytest.approx(unit(theirs(texts[index], "mean")), abs=1e-4)


async def test_a_long_input_may_fill_the_context(engine: Recorder, theirs: Embed) -> None:
    ids = [3 + index % 300 for index in range(CONTEXT)]
    async with serve(engine) as server:
        (found,) = await vectors(server, ids)
        long = await post(server, PATH, input=["a", "a" * (CONTEXT + 1)])
        listed = await post(server, PATH, input=[[1], [*ids, 1]])
        hopeless = await post(server, PATH, input="a " * 10 * CONTEXT)
    assert found == pytest.approx(unit(theirs(ids, "mean")), abs=1e-4)
    assert refusal(long) == ("input[1]", "context_length_exceeded")
    assert refusal(listed) == ("input[1]", "context_length_exceeded")
    assert refusal(hopeless) == ("input", "context_length_exceeded")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input[1]", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [[]]}, "input[0]", "invalid_value"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": ["a", 5]}, "input[1]", "invalid_type"),
        ({"input": [1, "a"]}, "input[0][1]", "invalid_type"),
        ({"input": [[1, -1]]}, "input[0][1]", "invalid_value"),
        ({"input": [[1], [320]]}, "input[1]", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": WIDTH + 1}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "pooling": "cls"}, "pooling", "invalid_value"),
        ({"input": "a", "normalize": 1}, "normalize", "invalid_type"),
        ({"input": "a", "cache_salt": "mine"}, "cache_salt", "unsupported_parameter"),
        (
            {"input": "a", "truncate_prompt_tokens": 5},
            "truncate_prompt_tokens",
            "unsupported_parameter",
        ),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
async def test_what_is_refused(engine: Recorder, body: Any, param: str, code: str) -> None:
    async with serve(engine) as server:
        response = await post(server, PATH, **body)
    assert refusal(response) == (param, code)
    assert engine.added == []


async def test_as_many_token_ids_as_one_likes(engine: Recorder) -> None:
    """A list of ids is one input: the bound on inputs is not one on ids."""
    async with serve(engine) as server:
        response = await post(server, PATH, input=[1] * (MAX_INPUTS + 1))
    assert refusal(response) == ("input", "context_length_exceeded")


async def test_other_models_are_not_found(engine: Recorder) -> None:
    async with serve(engine) as server:
        with pytest.raises(openai.NotFoundError) as caught:
            await server.client.embeddings.create(model="gpt-9", input="a")
    assert caught.value.code == "model_not_found"


class Stopping:
    """A runner that does something at a step."""

    def __init__(self, engine: Recorder, at: int, act: Callable[[], None]) -> None:
        self._runner = runner_of(engine.engine)
        self._steps = itertools.count()
        self._at, self._act = at, act

    def run(self, step: Step) -> StepResult:
        if next(self._steps) == self._at:
            self._act()
        return self._runner.run(step)


async def test_a_failing_device_is_the_servers_fault(engine: Recorder) -> None:
    """And the next request is answered."""

    def fail() -> None:
        raise RuntimeError("no memory")

    engine.engine.decisions._runner = Stopping(engine, 1, fail)
    async with serve(engine) as server:
        response = await post(server, PATH, input=TEXTS)
        found = await vectors(server, TEXTS)
    assert refusal(response, 500) == (None, "internal_error")
    assert "memory" not in response.text
    assert len(found) == len(TEXTS)


async def test_a_client_that_leaves_ends_the_work(engine: Recorder) -> None:
    """The engine drops the request between two steps of it."""
    loop, reached, left = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def wait() -> None:
        loop.call_soon_threadsafe(reached.set)
        asyncio.run_coroutine_threadsafe(left.wait(), loop).result(PATIENCE_S)

    stopping = Stopping(engine, 1, wait)
    engine.engine.decisions._runner = stopping
    async with serve(engine) as server:
        request = asyncio.create_task(post(server, PATH, input=[[5] * 200]))
        await asyncio.wait_for(reached.wait(), PATIENCE_S)
        request.cancel()
        await asyncio.wait_for(server.context.driver._idle.wait(), PATIENCE_S)
        left.set()
        assert len(await vectors(server, "a")) == 1
    # One step ended for the one that left, five for the other.
    assert next(stopping._steps) == 2 + len(engine.info.decision_layers) + 1
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_a_full_queue_is_429_and_a_stopping_server_503(engine: Recorder) -> None:
    async with serve(engine, max_num_queued_reqs=0) as server:
        driver = server.context.driver
        capacity = driver.capacity
        driver._max_waiting = -capacity
        full = await post(server, PATH, input="a")
        driver._max_waiting = 0
        await driver.drain(PATIENCE_S)
        late = await post(server, PATH, input="a")
    assert refusal(full, 429) == (None, "queue_full")
    assert "retry-after" in full.headers
    assert refusal(late, 503) == (None, "shutting_down")


@pytest.fixture
def embedded(smollm2_dir: Path) -> tuple[Recorder, Tokenizer]:
    config = EngineConfig(
        model=MODEL,
        device="cpu",
        weights=Weights.FP32,
        dtype="float32",
        exits="none",
        draft_head="none",
        max_model_len=512,
    )
    made = build_engine(config, smollm2_dir, model_name=MODEL, num_blocks=64)
    return Recorder(made), Tokenizer.load(smollm2_dir)


@pytest.fixture
def smollm2_theirs(smollm2_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@pytest.mark.weights
@pytest.mark.timeout(180)
async def test_the_embedded_model_embeds_as_transformers_does(
    embedded: tuple[Recorder, Tokenizer], smollm2_theirs: Any
) -> None:
    """In fp32, mean and last, texts that begin alike among them."""
    recorder, tokenizer = embedded
    texts = [
        "A cat sat on the mat.",
        "A cat sat on the mat and looked.",
        "Rates rose by 2 %. " * 20,
    ]
    async with serve(recorder) as server:
        server.context.tokenizer = tokenizer
        found = {pooling: await vectors(server, texts, pooling=pooling) for pooling in Pooling}
    for index, ids in enumerate(tokenizer.encode(texts, 512)):
        with torch.inference_mode():
            states = smollm2_theirs.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        for pooling, wanted in ((Pooling.MEAN, states.mean(0)), (Pooling.LAST, states[-1])):
            assert found[pooling][index] == pytest.approx(unit(wanted.tolist()), abs=1e-4)


async def test_what_is_counted(engine: Recorder) -> None:
    async with serve(engine) as server:
        await vectors(server, TEXTS)
        async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            text = (await client.get("/metrics")).text
    who = f'engine="0",model_name="{MODEL}"'
    assert f"offramp:embeddings_total{{{who}}} 3.0" in text
    assert (
        f'vllm:request_success_total{{engine="0",finished_reason="stop",model_name="{MODEL}"}} 1.0'
        in text
    )
