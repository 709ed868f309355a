"""The server with a real engine, as a process, driven by the official client."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai import OpenAI

from tests.server.process import running

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
LISTS = {"return_token_ids": True, "return_exit_layers": True}


def check_chat(url: str, mode: str) -> str:
    """Plain and streamed greedy answers agree in text, tokens and depth; returns the text."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        options: Any = {
            "model": model,
            "messages": QUESTION,
            "max_tokens": 12,
            "temperature": 0,
            "extra_body": {**LISTS, "early_exit": mode},
        }
        plain: Any = client.chat.completions.create(**options)
        stream = client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        *parts, usage = list(stream)
    choice = plain.choices[0]
    layers = plain.metrics["early_exit"]["layers_total"]
    assert len(choice.token_ids) == len(choice.exit_layers) == plain.usage.completion_tokens
    assert all(1 <= layer <= layers for layer in choice.exit_layers)
    assert plain.metrics["early_exit"]["mode"] == mode
    deltas: list[Any] = [part.choices[0] for part in parts]
    assert "".join(delta.delta.content or "" for delta in deltas) == choice.message.content
    assert [token for delta in deltas for token in delta.token_ids] == choice.token_ids
    assert usage.usage.completion_tokens == plain.usage.completion_tokens
    text: str = choice.message.content
    return text


def check_metrics(url: str) -> None:
    """The scrape has what this run must have left."""
    text = httpx2.get(f"{url}/metrics").text
    for name in ("offramp:exit_tokens_total", "offramp:layers_executed_total"):
        assert f"\n{name}{{" in text
    assert 'finished_reason="length"' in text


def test_tiny() -> None:
    with running("tiny") as process:
        url = process.address()
        check_chat(url, "off")
        check_metrics(url)


@pytest.mark.weights
@pytest.mark.usefixtures("smollm2_dir")
@pytest.mark.timeout(180)
def test_smollm2() -> None:
    with running("smollm2-135m", "--max-model-len", "1024", "--kv-cache-memory", "0.2") as process:
        url = process.address()
        assert "Paris" in check_chat(url, "off")
        check_metrics(url)
