"""Metrics and the throughput line, from engine output alone."""

from __future__ import annotations

import time

import pytest
from prometheus_client import generate_latest

from offramp.models.sampling_params import SamplingParams
from offramp.server.engine.request import (
    EngineOutput,
    GenerationRequest,
    RequestStats,
    StepStats,
    TokenEvent,
)
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
)
# What dashboards made for vLLM ask for.
MIRROR = [
    "e2e_request_latency_seconds_bucket",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "request_success_total",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_sum",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "iteration_tokens_total_count",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "cache_config_info",
]
OWN = [
    "exit_layer_bucket",
    "exit_tokens_total",
    "layers_executed_total",
    "layers_possible_total",
    "segment_queue_depth",
    "segment_batch_size_bucket",
    "kv_debt_tokens",
    "kv_fill_tokens_total",
    "exit_audits_total",
    "exit_disagreements_total",
    "exit_threshold",
    "stayed_tokens_total",
]


def request(identity: str = "a") -> GenerationRequest:
    return GenerationRequest(identity, (1, 2, 3), SamplingParams(max_tokens=5))


def event(layers: tuple[int, ...], executed: int) -> TokenEvent:
    now = time.monotonic()
    stats = RequestStats(now, now, layers_executed=executed, prompt_tokens=3)
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
    observer = metrics.request(request(), n=1)
    observer.event(event((4,), 4))
    text = generate_latest(metrics.registry).decode()
    for name in (*(f"vllm:{name}" for name in MIRROR), *(f"offramp:{name}" for name in OWN)):
        assert f"\n{name}{{" in text, name


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


def test_tokens_are_counted_by_depth_and_phase(metrics: Metrics) -> None:
    observer = metrics.request(request(), n=1)
    observer.event(event((4,), 4))
    observer.event(event((2, 2), 8))
    assert value(metrics, "offramp:exit_layer_sum", phase="prefill") == 4
    assert value(metrics, "offramp:exit_layer_sum", phase="decode") == 4
    assert value(metrics, "offramp:layers_executed_total") == 8
    assert value(metrics, "offramp:layers_possible_total") == 12
    assert value(metrics, "vllm:prompt_tokens_total") == 3


def test_a_sequence_ends_once(metrics: Metrics) -> None:
    observer = metrics.request(request(), n=1)
    observer.finish("abort")
    observer.finish("stop")
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1


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
