"""A real Prometheus that scrapes a loaded server: every panel and every alert finds its data."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml

from offramp.server.commands.exits import main
from tests.server.process import running

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "depth.json").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((DOCKER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
VLLM = json.loads((ROOT / "tests/data/vllm_dashboards.json").read_text(encoding="utf-8"))
PATIENCE_S = 40.0
LOAD_S = 6.0
SCRAPE_S = 1
WINDOW = "5s"
# Between operands of an alert; those of arithmetic stay together.
OPERATORS = re.compile(r"\s+(?:and|or|unless)\s+|\s*(?:==|>|<)\s*")

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus is not installed",
)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus, and when the server it scrapes was busy."""

    url: str
    server: str
    began: float
    ended: float

    def series(self, expression: str) -> list[list[float]]:
        """Values of a query while the server was busy; those that are no number are left out."""
        response = httpx2.get(
            f"{self.url}/api/v1/query_range",
            params={"query": expression, "start": self.began, "end": self.ended, "step": SCRAPE_S},
            timeout=PATIENCE_S,
        )
        answer = response.json()
        assert answer["status"] == "success", (expression, answer)
        found = [
            [float(value) for _, value in series["values"]] for series in answer["data"]["result"]
        ]
        return [[value for value in values if math.isfinite(value)] for values in found]

    def has_data(self, expression: str) -> bool:
        """Whether a query had a number."""
        return any(self.series(expression))


def draft_head(folder: Path) -> Path:
    """A draft head of the tiny model, hardly trained."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 60, (60, 14), generator=generator).tolist()
    answers, head = folder / "answers.jsonl", folder / "a.draft.safetensors"
    lines = [json.dumps({"prompt": row[:4], "answer": row[4:]}) for row in rows]
    answers.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--model", "tiny", "--out", str(head), "--answers", str(answers), "--epochs", "1"]
    assert main(["train-draft", *words, "--batch", "64", "--vocab", "100", "--device", "cpu"]) == 0
    return head


LEAVING = {"mode": "adaptive", "criterion": "max_prob", "threshold": 0.0, "when": "always"}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "s",
        "schema": {
            "type": "object",
            "properties": {"first": {"type": "boolean"}},
            "required": ["first"],
        },
    },
}
QUESTIONS = [
    {"type": "predicate", "instructions": "It is so."},
    {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]},
    {"type": "score", "instructions": "How?", "levels": [{"label": "bad"}, {"label": "good"}]},
]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a b a b", "max_tokens": 40, "early_exit": LEAVING}),
    ("/v1/completions", {"prompt": "a b a b", "max_tokens": 40, "early_exit": "lossless"}),
    ("/v1/completions", {"prompt": "a b a b", "max_tokens": 40, "early_exit": "off", "n": 2}),
    ("/v1/completions", {"prompt": "c", "max_tokens": 40, "ignore_eos": True, "stream": True}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "response_format": SCHEMA},
    ),
    ("/v1/decisions", {"input": "A cat.", "questions": QUESTIONS}),
    ("/v1/embeddings", {"input": ["one", "two"]}),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}),
    ("/v1/completions", {"prompt": "a", "model": "another"}),
]


def load(url: str) -> set[int]:
    """Send mixed requests, more at once than the server takes; returns the statuses met."""
    end = time.monotonic() + LOAD_S
    with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:

        def send(first: int) -> set[int]:
            seen = set()
            while time.monotonic() < end:
                for path, body in REQUESTS[first:] + REQUESTS[:first]:
                    seen.add(client.post(path, json={"temperature": 0, **body}).status_code)
            return seen

        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            return set().union(*pool.map(send, range(len(REQUESTS))))


@contextmanager
def scraping(server: str, folder: Path) -> Iterator[str]:
    """Prometheus with the configuration of the containers; only its target and its pace differ."""
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DOCKER / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.removeprefix("http://")]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(words, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def wait_for_scrapes(url: str) -> None:
    """Return when the server has been scraped."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        # It listens before it is ready, and listens late.
        with contextlib.suppress(httpx2.TransportError):
            answer = httpx2.get(f"{url}/api/v1/query", params={"query": "up"}, timeout=5)
            found = answer.json()["data"]["result"] if answer.is_success else []
            if any(series["value"][1] == "1" for series in found):
                return
        time.sleep(0.2)
    raise AssertionError("Prometheus has not scraped the server")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    options = [
        *("--exits", "shared:1,2", "--draft-head", str(draft_head(folder))),
        *("--exit-audit-rate", "1", "--max-num-seqs", "3", "--max-num-queued-reqs", "2"),
    ]
    with running("tiny", *options) as process:
        server = process.address()
        with scraping(server, folder) as url:
            wait_for_scrapes(url)
            began = time.time()
            assert load(server) == {200, 400, 404, 429}
            time.sleep(2 * SCRAPE_S)
            yield Prometheus(url, server, began, time.time())


PANELS = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]


@pytest.mark.parametrize("query", PANELS)
def test_a_panel_shows_data(prometheus: Prometheus, query: str) -> None:
    concrete = query.replace("$__rate_interval", WINDOW).replace("$model", ".*")
    assert "$" not in concrete
    assert prometheus.has_data(concrete), concrete


@pytest.mark.parametrize(
    "series",
    [
        'offramp:exit_tokens_total{exit_layer="1"}',
        'offramp:draft_tokens_total{source="grammar"}',
        "offramp:accepted_tokens_total",
        "offramp:kv_fill_tokens_total",
        "offramp:exit_audits_total",
        'offramp:decisions_total{type="score"}',
        "offramp:embeddings_total",
        'offramp:requests_refused_total{code="queue_full"}',
        "vllm:prefix_cache_hits_total",
    ],
)
def test_the_load_was_mixed(prometheus: Prometheus, series: str) -> None:
    assert prometheus.series(f"sum({series})")[0][-1] > 0


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_the_operands_of_an_alert_have_data(prometheus: Prometheus, rule: dict[str, Any]) -> None:
    prometheus.series(rule["expr"])
    operands = OPERATORS.split(rule["expr"])
    assert len(operands) > 1
    for operand in operands:
        assert prometheus.has_data(operand), operand


def test_prometheus_holds_every_alert_and_none_fires(prometheus: Prometheus) -> None:
    answer = httpx2.get(f"{prometheus.url}/api/v1/rules", timeout=PATIENCE_S).json()
    rules = [rule for group in answer["data"]["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


@pytest.mark.parametrize("dashboard", VLLM)
def test_the_dashboards_of_vllm_show_data(prometheus: Prometheus, dashboard: str) -> None:
    for series in VLLM[dashboard]:
        assert prometheus.has_data(series), series


def test_promtool_takes_the_metrics(prometheus: Prometheus) -> None:
    text = httpx2.get(f"{prometheus.server}/metrics", timeout=PATIENCE_S).text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    # Its taste in names is not vLLM's, whose names these are or follow.
    complaints = [
        line
        for line in done.stderr.splitlines()
        if "should not contain ':'" not in line and not line.startswith("vllm:")
    ]
    assert done.returncode in {0, 3}, done.stderr
    assert complaints == []
