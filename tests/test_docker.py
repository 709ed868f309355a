"""The container files point at what exists, and the health check tells ready from not ready."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


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


def load(name: str) -> dict[str, dict[str, dict[str, list[str]]]]:
    loaded: dict[str, dict[str, dict[str, list[str]]]] = yaml.safe_load(
        (DOCKER / name).read_text(encoding="utf-8")
    )
    return loaded


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
    wanted = re.findall(r"^COPY ([\w./]+) ", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for name in wanted if name != "."} <= allowed
    assert [name for name in allowed - {"LICENSE"} if not (ROOT / name).exists()] == []
