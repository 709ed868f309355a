"""Metrics and the throughput line, from engine output alone."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from offramp.models.sampling_params import DraftSource, SamplingParams
from offramp.server.api.http_metrics import HttpExchange
from offramp.server.engine.request import (
    EngineOutput,
    GenerationRequest,
    RequestStats,
    StepStats,
    TokenEvent,
)
from offramp.server.instruments import ALL, Kind, markdown
from offramp.server.logs import StatsLog
from offramp.server.metrics import Metrics
from tests.server.fakes import FakeEngine

STATS = StepStats(
    kind="segments",
    segment=0,
    seconds=0.5,
    host_seconds=0.1,
    prefill_rows=6,
    decode_rows=2,
    layers_executed=16,
    running=3,
    waiting=1,
    kv_used_blocks=1,
    kv_total_blocks=4,
    debt_tokens=5,
    segment_queue=(2, 7),
    fill_tokens=3,
    fill_method="project",
    preemptions=1,
    prefix_queries=10,
    prefix_hits=4,
    stayed=2,
    drafted={DraftSource.HEAD: 5, DraftSource.NGRAM: 2},
    accepted={DraftSource.HEAD: 3, DraftSource.NGRAM: 0},
    drafts=2,
    accepted_at={0: 2, 1: 1},
)
# What the dashboards of vLLM's examples ask for: series, and labels they select or group by.
DASHBOARDS = json.loads(
    (Path(__file__).parents[1] / "data/vllm_dashboards.json").read_text(encoding="utf-8")
)


def request(identity: str = "a") -> GenerationRequest:
    return GenerationRequest(identity, (1, 2, 3), SamplingParams(max_tokens=5))


def event(layers: tuple[int, ...], executed: int, passes: int = 1) -> TokenEvent:
    now = time.monotonic()
    stats = RequestStats(now, now, layers_executed=executed, prompt_tokens=3, passes=passes)
    return TokenEvent("a", (9,) * len(layers), layers, stats)


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics("m")
    made.configure(FakeEngine().info)
    return made


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    who = {"model_name": "m", "engine": "0", **labels}
    return metrics.registry.get_sample_value(name, who)


def test_a_loaded_server_exports_all_promised_names(metrics: Metrics) -> None:
    metrics.observe(EngineOutput(stats=STATS))
    metrics.request(request(), 1, time.monotonic()).event(event((4,), 4))
    metrics.http(HttpExchange("GET", "/v1/models", 200))
    metrics.server({"ready": True}, 0, 0, 0)
    metrics.refused("queue_full")
    suffixes = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count"), Kind.SUMMARY: ("_sum", "_count")}
    text = generate_latest(metrics.registry).decode()
    for each in ALL:
        for suffix in suffixes.get(each.kind, ("",)):
            assert re.search(rf"^{each.sample}{suffix}[ {{]", text, re.MULTILINE), each.name


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_the_dashboards_of_vllm_find_what_they_ask_for(metrics: Metrics, dashboard: str) -> None:
    found = {
        sample.name: set(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    for series, labels in DASHBOARDS[dashboard].items():
        assert set(labels) <= found[series], series


def test_the_page_of_metrics_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == markdown(), "run `make docs`"


def test_a_step_sets_gauges_and_raises_counters(metrics: Metrics) -> None:
    metrics.observe(EngineOutput(stats=STATS))
    metrics.observe(EngineOutput(stats=STATS))
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 1
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    assert value(metrics, "vllm:prefix_cache_hits_total") == 8
    assert value(metrics, "offramp:kv_debt_tokens") == 5
    assert value(metrics, "offramp:kv_fill_tokens_total", method="project") == 6
    assert value(metrics, "offramp:segment_queue_depth", segment="1") == 7
    assert value(metrics, "offramp:stayed_tokens_total") == 4


def test_guesses_of_all_sources_are_speculative_decoding(metrics: Metrics) -> None:
    metrics.observe(EngineOutput(stats=STATS))
    assert value(metrics, "offramp:draft_tokens_total", source="head") == 5
    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 2
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 7
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 3
    by_place = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [value(metrics, by_place, position=str(place)) for place in range(3)] == [2, 1, 0]


def test_a_prompt_is_counted_by_where_its_tokens_came_from(metrics: Metrics) -> None:
    stats = RequestStats(0.0, prompt_tokens=3, cached_tokens=2)
    observer = metrics.request(request(), 1, time.monotonic())
    observer.event(TokenEvent("a", (9,), (4,), stats))
    name = "vllm:prompt_tokens_by_source_total"
    assert value(metrics, name, source="local_compute") == 1
    assert value(metrics, name, source="local_cache_hit") == 2
    assert value(metrics, "vllm:request_prefill_kv_computed_tokens_sum") == 1


def test_what_cannot_be_counted_costs_nothing_else(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    metrics.count("vllm:prompt_tokens", 1)
    metrics.later(fail)
    metrics.later(metrics.count, "vllm:prompt_tokens", 2)
    assert value(metrics, "vllm:prompt_tokens_total") == 3
    assert "a sample cannot be counted" in caplog.text


def test_many_samples_do_not_pile_up(metrics: Metrics) -> None:
    for _ in range(10_000):
        metrics.later(metrics.count, "vllm:prompt_tokens", 1)
    assert len(metrics._pending) < 1000
    assert value(metrics, "vllm:prompt_tokens_total") == 10_000


def test_gauges_show_the_last_step(metrics: Metrics) -> None:
    for running in (3, 2, 5):
        metrics.observe(EngineOutput((), StepStats("segments", 0, running=running)))
    assert value(metrics, "vllm:num_requests_running") == 5
    metrics.observe(EngineOutput((), StepStats("idle", 0, running=1)))
    assert value(metrics, "vllm:num_requests_running") == 1
    assert value(metrics, "offramp:engine_steps_total") == 3


def test_tokens_of_8_bit_inputs_are_counted(metrics: Metrics) -> None:
    observer = metrics.request(request(), 1, time.monotonic())
    made = event((4, 4), 8)
    observer.event(made._replace(stats=made.stats._replace(coarse=True)))
    assert value(metrics, "offramp:int8_tokens_total") == 2


async def test_an_event_loop_that_is_held_up_is_seen(metrics: Metrics) -> None:
    watch = asyncio.create_task(metrics.watch_lag())
    await asyncio.sleep(0)
    time.sleep(0.3)  # noqa: ASYNC251 (what must not happen is the test)
    await asyncio.sleep(0.01)
    watch.cancel()
    assert (value(metrics, "offramp:event_loop_lag_seconds_sum") or 0) > 0.15


def test_tokens_are_counted_by_depth_and_phase(metrics: Metrics) -> None:
    observer = metrics.request(request(), 1, time.monotonic())
    observer.event(event((4,), 4))
    observer.event(event((2, 2), 8, passes=2))
    assert value(metrics, "offramp:passes_total") == 2
    assert value(metrics, "offramp:int8_tokens_total") == 0
    assert value(metrics, "offramp:exit_layer_sum", phase="prefill") == 4
    assert value(metrics, "offramp:exit_layer_sum", phase="decode") == 4
    assert value(metrics, "offramp:layers_executed_total") == 8
    assert value(metrics, "offramp:layers_possible_total") == 12
    assert value(metrics, "vllm:prompt_tokens_total") == 3


def test_a_sequence_ends_once(metrics: Metrics) -> None:
    observer = metrics.request(request(), 1, time.monotonic())
    observer.finish("abort")
    observer.finish("stop")
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1


def test_queue_and_prefill_make_up_the_time_to_the_first_token(metrics: Metrics) -> None:
    """The engine may admit a request before its answer is begun in the process of the server."""
    submitted = time.monotonic() - 2
    stats = RequestStats(submitted, admitted_at=submitted + 0.5, prompt_tokens=3)
    observer = metrics.request(request(), 1, submitted)
    observer.event(TokenEvent("a", (9,), (4,), stats))
    observer.finish("stop")
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == pytest.approx(0.5)
    prefill = value(metrics, "vllm:request_prefill_time_seconds_sum")
    first = value(metrics, "vllm:time_to_first_token_seconds_sum")
    assert prefill is not None
    assert first == pytest.approx(0.5 + prefill)


def test_refusals_are_counted_from_nothing_on(metrics: Metrics) -> None:
    """A series that begins with its first refusal would hide that one from rates."""
    name = "offramp:requests_refused_total"
    for code in ("queue_full", "loading", "invalid_api_key", "model_not_found", "head_too_large"):
        assert value(metrics, name, code=code) == 0, code
    assert value(metrics, name, code="internal_error") is None


def test_two_servers_in_one_process_do_not_share(metrics: Metrics) -> None:
    Metrics("m").count("vllm:generation_tokens", 5)
    assert value(metrics, "vllm:generation_tokens_total") == 0


def test_the_line_of_a_busy_server_says_throughput_and_depth() -> None:
    stats = StatsLog()
    stats.configure(4)
    assert stats.line() is None
    stats.observe(EngineOutput((event((2, 4), 6),), STATS))
    line = stats.line()
    assert line is not None
    for part in ("running 3", "waiting 1", "KV use 25.0%", "prefix hits 40%"):
        assert part in line
    assert "mean exit layer 3.00 (25.0% saved)" in line
    assert stats.line() is None
