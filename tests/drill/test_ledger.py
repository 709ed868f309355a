"""The drill's account sees what must not be."""

from __future__ import annotations

import json
from collections.abc import Sequence

import httpx2
import pytest

from tests.drill.ledger import Ledger, ask


def chunk(reason: str | None = None) -> str:
    return json.dumps({"id": "a", "choices": [{"index": 0, "text": "x", "finish_reason": reason}]})


ERROR = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": None}})
BAD_ERROR = json.dumps({"error": "no"})


async def asked(
    lines: Sequence[str], status: int = 200, *, leave_after: int | None = None
) -> Ledger:
    text = lines[0] if status != 200 else "".join(f"data: {line}\n\n" for line in lines)
    transport = httpx2.MockTransport(lambda _: httpx2.Response(status, text=text))
    ledger = Ledger()
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        await ask(client, ledger, {}, leave_after=leave_after)
    return ledger


@pytest.mark.parametrize(
    ("lines", "status", "ended"),
    [
        ([chunk(), chunk("length"), "[DONE]"], 200, "finished"),
        ([chunk(), ERROR, "[DONE]"], 200, "error"),
        ([ERROR], 503, "refused 503"),
        ([ERROR], 500, "failed 500"),
    ],
)
async def test_good_ends(lines: list[str], status: int, ended: str) -> None:
    ledger = await asked(lines, status)
    assert dict(ledger.ended) == {ended: 1}
    assert ledger.faults == []
    assert ledger.accepted == (0 if ended.startswith("refused") else 1)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([chunk(), "[DONE]"], "0 terminal events"),
        ([chunk("stop"), chunk("stop"), "[DONE]"], "2 terminal events"),
        ([chunk("stop"), ERROR, "[DONE]"], "2 terminal events"),
        ([chunk("stop")], "without [DONE]"),
        ([chunk("stop"), "[DONE]", chunk()], "behind [DONE]"),
        ([BAD_ERROR, "[DONE]"], "not in OpenAI's form"),
        (["{"], "connection was lost"),
    ],
)
async def test_bad_ends(lines: list[str], fault: str) -> None:
    assert any(fault in found for found in (await asked(lines)).faults)


async def test_leaving_is_no_fault() -> None:
    ledger = await asked([chunk(), chunk(), chunk()], leave_after=2)
    assert dict(ledger.ended) == {"left": 1}
    assert ledger.faults == []


def test_only_some_ends_are_meant() -> None:
    ledger = Ledger()
    ledger.ended.update(finished=2, error=1)
    ledger.only("finished")
    assert ledger.faults == ["1 requests ended with error"]
