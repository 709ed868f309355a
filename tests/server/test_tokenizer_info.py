"""GET /tokenizer_info, and what lm_eval's remote tokenizer does with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import jinja2
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offramp.server.text.tokenizer import Tokenizer
from offramp.server.text.tokenizer_info import tokenizer_info
from tests.server.fakes import CONTEXT, PATIENCE_S, FakeEngine, byte_backend, serving

MESSAGES = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "Hi <there>"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_dir)


async def test_a_client_formats_prompts_as_the_server_does(
    tokenizer: Tokenizer, tiny_dir: Path
) -> None:
    """The three requests of lm_eval.utils.RemoteTokenizer, and what it makes of the answers."""
    engine = FakeEngine()
    engine.info = replace(engine.info, vocab_size=320)
    async with serving(engine) as server:
        server.context.tokenizer = tokenizer
        async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            info = (await client.get("/tokenizer_info")).json()

            async def encode(text: str) -> list[int]:
                body = {"prompt": text, "add_special_tokens": False}
                found: list[int] = (await client.post("/tokenize", json=body)).json()["tokens"]
                return found

            environment = jinja2.Environment(
                undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
            )
            template = environment.from_string(info["chat_template"])
            text = template.render(messages=MESSAGES, add_generation_prompt=True)
            ids = await encode(text)
            end = await encode(info["eos_token"])
            back = (await client.post("/detokenize", json={"tokens": ids})).json()["prompt"]
            counted = (await client.post("/tokenize", json={"messages": MESSAGES})).json()
    own: Any = AutoTokenizer.from_pretrained(tiny_dir)
    assert end == [own.eos_token_id]
    assert (
        ids
        == counted["tokens"]
        == own.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    )
    assert back == text
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert {name: info[name] for name in names} == {name: getattr(own, name) for name in names}
    assert info["tokenizer_class"] == type(own).__name__
    # The model's own limit is 2048; the server's is less.
    assert info["model_max_length"] == CONTEXT
    assert str(tiny_dir) not in json.dumps(info)


def test_what_a_tokenizer_does_not_have() -> None:
    """No chat template, no token to begin with, and no limit."""
    loaded = PreTrainedTokenizerFast(tokenizer_object=byte_backend(), eos_token="<end>")
    info = tokenizer_info(loaded)
    assert "chat_template" not in info
    assert (info["bos_token"], info["eos_token"]) == (None, "<end>")
    assert info["model_max_length"] > 10**20
    json.dumps(info, allow_nan=False)


def test_settings_that_json_cannot_hold() -> None:
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=byte_backend(),
        eos_token=AddedToken("<end>", special=True),
        chat_template="a file's own",
        own={"names": (AddedToken("a"), 1), 5: Path("b")},
    )
    info = tokenizer_info(loaded, "the one in use")
    assert info["own"] == {"names": ["a", 1], "5": "b"}
    assert info["chat_template"] == "the one in use"


async def test_a_tokenizer_without_settings_has_the_servers_limit() -> None:
    async with serving() as server, httpx2.AsyncClient(base_url=server.url) as client:
        assert (await client.get("/tokenizer_info")).json() == {"model_max_length": CONTEXT}
