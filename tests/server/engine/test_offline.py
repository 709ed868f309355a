"""The closed load: order, concurrency, and everything kept."""

from __future__ import annotations

import pytest

from offramp.server.engine.offline import run_all
from offramp.server.engine.request import EngineOutput, FinishReason

from .fake_runner import expected_answer
from .test_engine_machine import LAYERS, fake_engine, request


@pytest.mark.parametrize("concurrency", [1, 2, 50])
def test_answers_come_in_the_order_of_the_requests(concurrency: int) -> None:
    """Lengths differ, so they end in another order."""
    engine, _ = fake_engine(num_blocks=40)
    requests = [request(str(i), [i], 1 + (7 * i) % 11) for i in range(9)]
    done = run_all(engine, iter(requests), concurrency=concurrency)
    assert [item.request for item in done] == requests
    for item in done:
        count = item.request.sampling.max_tokens
        assert item.token_ids == expected_answer(item.request.prompt, count)
        assert item.exit_layers == [LAYERS] * count
        assert item.reason is FinishReason.LENGTH
        assert item.stats is not None
        assert item.stats.generated_tokens == count
        assert item.times == sorted(item.times)
        assert item.submitted_at <= item.times[0]
        assert len(item.times) == count


def test_no_more_are_in_flight_than_asked_for() -> None:
    engine, _ = fake_engine(num_blocks=40)
    in_flight: list[int] = []

    def observe(output: EngineOutput) -> None:
        if output.stats is not None:
            in_flight.append(output.stats.running + output.stats.waiting)

    run_all(engine, [request(str(i), [i], 4) for i in range(7)], concurrency=3, observe=observe)
    assert max(in_flight) == 3


def test_a_request_that_cannot_be_served_does_not_stop_the_rest() -> None:
    engine, _ = fake_engine()
    done = run_all(engine, [request("a", [], 3), request("b", [1], 3)], concurrency=1)
    assert [item.reason for item in done] == [FinishReason.ERROR, FinishReason.LENGTH]


def test_no_requests_no_answers() -> None:
    engine, _ = fake_engine()
    assert run_all(engine, [], concurrency=4) == []
