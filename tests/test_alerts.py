"""Prometheus' own checks of its files, and what each alert fires on and stays silent on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RULES = ROOT / "docker" / "alerts.yml"
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}
WHO = 'instance="a",job="offramp",model_name="m",engine="0"'
# A server as it should be, a sample a minute. Of counters "0+60x120" is one a second.
HEALTHY = {
    'up{instance="a",job="offramp"}': "1x120",
    f'offramp:engine_state{{{WHO},state="ready"}}': "1x120",
    f'offramp:engine_state{{{WHO},state="restarting"}}': "0x120",
    f"offramp:engine_restarts_total{{{WHO}}}": "0x120",
    f'vllm:request_success_total{{{WHO},finished_reason="stop"}}': "0+60x120",
    f'vllm:request_success_total{{{WHO},finished_reason="error"}}': "0x60 1x60",
    f'offramp:requests_refused_total{{{WHO},code="queue_full"}}': "0x60 5x60",
    f'offramp:requests_refused_total{{{WHO},code="invalid_value"}}': "0+60x120",
    'http_requests_total{instance="a",job="offramp",status="2xx"}': "0+60x120",
    'http_requests_total{instance="a",job="offramp",status="4xx"}': "0+6x120",
    f'vllm:time_to_first_token_seconds_bucket{{{WHO},le="1.0"}}': "0+60x120",
    f'vllm:time_to_first_token_seconds_bucket{{{WHO},le="10.0"}}': "0+60x120",
    f'vllm:time_to_first_token_seconds_bucket{{{WHO},le="+Inf"}}': "0+60x120",
    f"vllm:num_requests_waiting{{{WHO}}}": "20x120",
    f"vllm:kv_cache_usage_perc{{{WHO}}}": "0.9x20 1x3 0.9x97",
    f"offramp:exit_audits_total{{{WHO}}}": "0+60x120",
    f"offramp:exit_disagreements_total{{{WHO}}}": "0+1x120",
    f"offramp:exit_quality_target{{{WHO}}}": "0.98x120",
    f"offramp:exit_guard_level{{{WHO}}}": "0x120",
    f'offramp:event_loop_lag_seconds_bucket{{{WHO},le="0.05"}}': "0+600x120",
    f'offramp:event_loop_lag_seconds_bucket{{{WHO},le="1.0"}}': "0+600x120",
    f'offramp:event_loop_lag_seconds_bucket{{{WHO},le="+Inf"}}': "0+600x120",
}
# What makes each alert, and it alone, fire.
FAULTS = {
    "OfframpDown": {'up{instance="a",job="offramp"}': "0x120"},
    "OfframpNotReady": {
        f'offramp:engine_state{{{WHO},state="ready"}}': "0x120",
        f'offramp:engine_state{{{WHO},state="restarting"}}': "1x120",
    },
    "OfframpEngineRestarted": {f"offramp:engine_restarts_total{{{WHO}}}": "0x85 1x40"},
    "OfframpErrors": {f'vllm:request_success_total{{{WHO},finished_reason="error"}}': "0+3x120"},
    "OfframpRefusing": {f'offramp:requests_refused_total{{{WHO},code="queue_full"}}': "0+10x120"},
    "OfframpSlowFirstToken": {
        f'vllm:time_to_first_token_seconds_bucket{{{WHO},le="1.0"}}': "0+54x120"
    },
    "OfframpQueueGrowing": {f"vllm:num_requests_waiting{{{WHO}}}": "0+2x120"},
    "OfframpKVCacheFull": {f"vllm:kv_cache_usage_perc{{{WHO}}}": "1x120"},
    "OfframpAgreementBelowPromise": {f"offramp:exit_disagreements_total{{{WHO}}}": "0+2x120"},
    "OfframpGuardTightened": {f"offramp:exit_guard_level{{{WHO}}}": "0x60 1x60"},
    "OfframpEventLoopLag": {
        f'offramp:event_loop_lag_seconds_bucket{{{WHO},le="0.05"}}': "0+500x120"
    },
}


def promtool(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = shutil.which("promtool")
    if command is None:
        pytest.skip("promtool is not installed")
    return subprocess.run(
        [command, *words], input=text, capture_output=True, text=True, check=False, timeout=50
    )


def test_promtool_takes_the_configuration_and_its_rules() -> None:
    done = promtool("check", "config", ROOT / "docker" / "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def case(faults: dict[str, str], firing: list[str]) -> dict[str, Any]:
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing]
    series = {**HEALTHY, **faults}
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "95m",
                "exp_samples": samples,
            }
        ],
    }


def run_cases(tmp_path: Path, cases: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "tests.json"
    # JSON is YAML.
    path.write_text(
        json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}),
        encoding="utf-8",
    )
    return promtool("test", "rules", path)


def test_a_healthy_server_wakes_nobody(tmp_path: Path) -> None:
    done = run_cases(tmp_path, [case({}, [])])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_on_its_fault_alone(tmp_path: Path, alert: str) -> None:
    done = run_cases(tmp_path, [case(FAULTS[alert], [alert])])
    assert done.returncode == 0, done.stderr


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    for name, rule in ALERTS.items():
        assert set(rule["annotations"]) == {"summary", "action"}, name
        assert rule["annotations"]["action"].endswith("."), name
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, name
        assert f"| `{name}` |" in page, name
