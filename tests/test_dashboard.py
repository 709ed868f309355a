"""Every query of the Grafana dashboard asks for a metric and labels the server really has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from offramp.server.engine.request import EngineInfo
from offramp.server.metrics import Metrics

DASHBOARD = json.loads(
    (Path(__file__).parents[1] / "docker/grafana/depth.json").read_text(encoding="utf-8")
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = sorted({target["expr"] for panel in PANELS for target in panel["targets"]})
METRIC = re.compile(r"\b(?:(?:offramp|vllm):\w+|http_\w+)")
# What Grafana needs of each kind of panel to draw it.
OPTIONS = {
    "stat": {"reduceOptions", "colorMode", "graphMode", "textMode"},
    "gauge": {"reduceOptions", "showThresholdMarkers", "showThresholdLabels"},
    "timeseries": {"legend", "tooltip"},
    "heatmap": {"calculate", "color", "yAxis", "rowsFrame", "cellValues", "legend", "tooltip"},
}
LABELS = re.compile(r"\{(.*?)\}")
GROUPING = re.compile(r"\bby \((.*?)\)")
# What a histogram's series carry beside its own labels.
IMPLIED_LABELS = {"le"}


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Label names of every series of a loaded server, by series name."""
    metrics = Metrics("tiny")
    metrics.configure(
        EngineInfo(
            model_name="tiny",
            num_layers=4,
            exit_layers=(2, 3),
            exit_thresholds=(0.9, 0.8),
            vocab_size=320,
            max_model_len=2048,
            block_size=16,
            num_blocks=64,
            max_num_seqs=4,
            dtype="float32",
        )
    )
    # The text form lists a labelled metric only once it has a value, so ask the registry.
    collectors = metrics.registry._names_to_collectors
    return {name: set(getattr(one, "_labelnames", ())) for name, one in collectors.items()}


@pytest.mark.parametrize("query", QUERIES)
def test_query_asks_for_what_exists(query: str, series: dict[str, set[str]]) -> None:
    names = METRIC.findall(query)
    assert names
    for name in names:
        assert name in series
    known = set.union(*(series[name] for name in names)) | IMPLIED_LABELS
    selected = {part.split("=")[0] for body in LABELS.findall(query) for part in body.split(",")}
    grouped = {part for body in GROUPING.findall(query) for part in body.split(", ")}
    assert selected | grouped <= known


def test_panels_have_the_fields_of_their_kind() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in PANELS:
        title = panel["title"]
        assert OPTIONS[panel["type"]] <= set(panel["options"]), title
        assert panel["description"].endswith("."), title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        assert "unit" in panel["fieldConfig"]["defaults"], title
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == list("ABCDEFG"[: len(letters)]), title
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], title
            # Buckets of a heat map are rows only in this format.
            assert (target.get("format") == "heatmap") == (panel["type"] == "heatmap"), title


def test_variables_are_declared() -> None:
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert declared == {"datasource", "model"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS)))
    assert used == {*declared, "__rate_interval"}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        cells = {(x + i, y + j) for i in range(width) for j in range(height)}
        assert not cells & taken, panel["title"]
        assert x + width <= 24
        taken |= cells


def test_every_metric_of_depth_is_shown() -> None:
    shown = {name for query in QUERIES for name in METRIC.findall(query)}
    assert {
        "offramp:exit_layer_bucket",
        "offramp:layers_executed_total",
        "offramp:layers_possible_total",
        "offramp:segment_queue_depth",
        "offramp:kv_debt_tokens",
        "offramp:kv_fill_tokens_total",
        "offramp:exit_threshold",
        "offramp:passes_total",
        "offramp:draft_tokens_total",
        "offramp:accepted_tokens_total",
        "offramp:exit_audits_total",
        "offramp:exit_disagreements_total",
        "offramp:exit_guard_level",
        "offramp:exit_quality_target",
        "offramp:requests_refused_total",
        "offramp:engine_restarts_total",
        "offramp:event_loop_lag_seconds_bucket",
        "offramp:decisions_total",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
    } <= shown
