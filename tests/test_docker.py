"""The container files point at what exists, and the health check tells ready from not ready."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@contextmanager
def server(status: int) -> Iterator[int]:
    """A server that answers /ready with ``status``; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield http.server_port
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def health(port: int) -> int:
    environment = os.environ | {"OFFRAMP_PORT": str(port)}
    command = [sys.executable, "-I", str(DOCKER / "healthcheck.py")]
    return subprocess.run(command, check=False, env=environment).returncode


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1)])
def test_health_follows_readiness(status: int, expected: int) -> None:
    with server(status) as port:
        assert health(port) == expected


def test_no_server_is_not_healthy() -> None:
    with server(200) as port:
        pass
    assert health(port) == 1


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_keep_to_their_specification(name: str) -> None:
    compose = PyCompose.from_yaml((DOCKER / name).read_text(encoding="utf-8"))
    compose.validate()
    volumes = [
        volume.split(":")[0]
        for service in load(name)["services"].values()
        for volume in service.get("volumes", [])
    ]
    declared = set(load(name).get("volumes", {}))
    assert {volume for volume in volumes if not volume.startswith(".")} == declared
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))
    assert load(name)["services"]["server"]["build"]["target"] in targets


def test_the_last_stage_serves_on_a_cpu_as_another_user_than_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    assert stages[-1].startswith("base AS cpu\n")
    for stage in stages:
        if stage.startswith("base AS "):
            assert stage.strip().endswith("USER 10001:10001")


def test_hadolint_has_nothing_to_say() -> None:
    command = shutil.which("hadolint", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [command, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.stdout + done.stderr == ""


def test_grafana_finds_what_is_mounted_for_it() -> None:
    compose = load("compose.yaml")["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in compose["volumes"])
    provider = load("grafana/dashboards.yaml")
    assert mounts["./grafana/dashboards.yaml"].startswith("/etc/grafana/provisioning/dashboards/")
    (own,) = provider["providers"]
    assert provider["apiVersion"] == 1
    assert own["type"] == "file"
    dashboard = mounts["./grafana/depth.json"]
    assert str(Path(dashboard).parent) == own["options"]["path"]
    assert compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    sources = load("grafana/datasource.yaml")
    assert mounts["./grafana/datasource.yaml"].startswith("/etc/grafana/provisioning/datasources/")
    (source,) = sources["datasources"]
    assert sources["apiVersion"] == 1
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    # What the panels' rates are taken over.
    assert source["jsonData"]["timeInterval"] == load("prometheus.yml")["global"]["scrape_interval"]
    variables = {each["name"]: each for each in load("grafana/depth.json")["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]


def test_rules_are_where_prometheus_looks_for_them() -> None:
    volumes = load("compose.yaml")["services"]["prometheus"]["volumes"]
    mounts = dict(volume.split(":")[:2] for volume in volumes)
    config = mounts["./prometheus.yml"]
    for name in load("prometheus.yml")["rule_files"]:
        assert mounts[f"./{name}"] == str(Path(config).parent / name)


def context_files() -> list[Path]:
    """What the build sees of the repository, by .dockerignore's exceptions."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    return [
        ROOT / line[1:] for line in lines if line.startswith("!") and (ROOT / line[1:]).exists()
    ]


def test_the_build_context_makes_a_wheel(tmp_path: Path) -> None:
    context = tmp_path / "context"
    for path in context_files():
        target = context / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, target, symlinks=True, ignore=ignored)
        else:
            shutil.copy(path, target)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=context, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.whl"))) == 1


def test_mounted_files_exist() -> None:
    volumes = [
        volume
        for service in load("compose.yaml")["services"].values()
        for volume in service.get("volumes", [])
    ]
    files = [volume.split(":")[0] for volume in volumes if volume.startswith(".")]
    assert len(files) == 5
    for file in files:
        assert (DOCKER / file).is_file(), file


@pytest.mark.parametrize("name", ["prometheus.yml", "grafana/datasource.yaml"])
def test_addresses_are_services(name: str) -> None:
    text = (DOCKER / name).read_text(encoding="utf-8")
    hosts = re.findall(r"([a-z]+):\d{4}", text)
    assert hosts
    assert set(hosts) <= set(load("compose.yaml")["services"])


def test_copied_files_are_in_the_build_context() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    wanted = re.findall(r"^COPY ([\w./]+) ", DOCKERFILE, re.MULTILINE)
    assert {name for name in wanted if name != "."} <= allowed
    assert [name for name in allowed - {"LICENSE"} if not (ROOT / name).exists()] == []
