"""``offramp doctor`` on machines that lack something: a line for each condition, with advice."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.kernels import native, native_build
from offramp.models.shapes import write_tiny
from offramp.server.bench import device
from offramp.server.commands import doctor
from offramp.server.config import GIB, EngineConfig, ServerConfig
from offramp.server.doctor import limits, machine, measure, model, serving
from offramp.server.doctor.findings import Finding, Level, look


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, with kernels that need not be compiled again."""
    for name in list(os.environ):
        if name.startswith("OFFRAMP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OFFRAMP_CACHE_DIR", str(tmp_path))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    status = doctor.main([*words, "--json", "--port", "0"])
    return status, json.loads(capsys.readouterr().out)


def named(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [each for each in document["findings"] if each["name"] == name]


def texts(found: list[Finding], level: Level) -> str:
    return "\n".join(f"{each.text} -> {each.advice}" for each in found if each.level is level)


def options(**values: Any) -> ServerConfig:
    engine = {k: v for k, v in values.items() if k in EngineConfig.model_fields}
    others = {k: v for k, v in values.items() if k not in engine}
    return ServerConfig.model_validate({"port": 0, **others, "engine": engine})


def test_a_good_machine(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    write_tiny(cache / "models/tiny")
    status, found = run(capsys, "tiny")
    assert (status, found["ok"]) == (0, True)
    assert "offramp" in named(found, "versions")[0]["text"]
    assert "4 layers" in named(found, "model")[0]["text"]
    assert named(found, "cached model")[0]["text"] == "tiny"
    assert "GiB free" in named(found, "memory")[0]["text"]


def test_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_TREADS", "2")
    assert doctor.main(["tiny", "--port", "0"]) == 1
    text = capsys.readouterr().out
    assert " X environment" in text
    assert "OFFRAMP_TREADS is not an option" in text
    assert "-> unset it" in text
    assert "A server would not start: 1 errors" in text


def test_a_model_is_measured(
    capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_PROMPTS", 1)
    monkeypatch.setattr(measure, "_TOKENS", 4)
    monkeypatch.setitem(device._BYTES, "cpu", 2**20)
    write_tiny(cache / "models/tiny")
    status, found = run(capsys, "tiny", "--measure", "--kernels", "torch")
    assert status == 0
    assert "GB/s" in named(found, "memory bandwidth")[0]["text"]
    assert "ms a token" in named(found, "decoding")[0]["text"]
    assert "no draft head" in named(found, "lossless")[0]["text"]


def test_what_is_not_here_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(capsys, "tiny", "--measure")
    assert status == 0
    assert named(found, "measure")[0]["level"] == "warning"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OFFRAMP_MAX_NUM_SEQS", "many", "valid integer"),
        ("OFFRAMP_EXIT_QUALITY", "nan", "finite"),
        ("OFFRAMP_LOG_LEVEL", "LOUD", "must be one of"),
        ("OFFRAMP_API_KEY", " ", "printable"),
        ("OFFRAMP_NOTHING", "1", "not an option"),
    ],
)
def test_variables_that_serve_refuses(name: str, value: str, told: str) -> None:
    good, found = serving.environment({name: value, "OFFRAMP_PORT": "0", "HOME": "/"})
    assert good == {"OFFRAMP_PORT": "0"}
    assert told in texts(found, Level.ERROR)


def test_kernels_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build, "PREBUILT", tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    found = look("kernels", lambda: machine.kernels(options()))
    assert "no C compiler" in texts(found, Level.WARNING)
    assert "install gcc" in texts(found, Level.WARNING)
    found = look("kernels", lambda: machine.kernels(options(kernels="native")))
    assert "no C compiler" in texts(found, Level.ERROR)


def test_kernels_of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "portable.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(native_build, "PREBUILT", tmp_path)
    monkeypatch.setattr(native_build, "_features", frozenset)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native_build.at_hand(tmp_path) == path
    native.library.cache_clear()
    try:
        found = look("kernels", lambda: machine.kernels(options()))
    finally:
        native.library.cache_clear()
    assert "none can be loaded" in texts(found, Level.WARNING)
    assert "portable.so do not load" in texts(found, Level.WARNING)


def test_a_wrong_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_SIMD", "sse9")
    found = look("kernels", lambda: machine.kernels(options()))
    assert "OFFRAMP_SIMD=sse9 is none of" in texts(found, Level.WARNING)


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (machine, serving, model):
        monkeypatch.setattr(module, "writable", lambda folder: False)
    monkeypatch.setattr(native_build, "PREBUILT", tmp_path)
    assert "OFFRAMP_CACHE_DIR" in texts(look("cache", serving.cache), Level.WARNING)
    assert "cannot be written" in texts(
        look("kernels", lambda: machine.kernels(options())), Level.WARNING
    )
    for name in ("tiny", "smollm2-135m"):
        found = look("model", lambda: model.absent(EngineConfig(model=name)))  # noqa: B023
        assert "has to be written" in texts(found, Level.ERROR)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "disk_free", lambda folder: 1000)
    found = look("model", lambda: model.absent(EngineConfig()))
    assert "free disk space" in texts(found, Level.ERROR)


def test_a_model_that_is_not_whole(cache: Path) -> None:
    write_tiny(cache / "models/tiny")
    (cache / "models/tiny/tokenizer.json").unlink()
    (cache / "models/smollm2-135m").mkdir()
    warned = texts(look("cache", serving.cache), Level.WARNING)
    assert "tiny is not whole" in warned
    assert "smollm2-135m is not whole" in warned


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("nan", "finite"),
        ("missing", "missing"),
        ("config", "num_hidden_layers"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_a_broken_model(fault: str, told: str, cache: Path) -> None:
    folder = write_tiny(cache / "own")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if fault == "nan":
        tensors["model.norm.weight"][0] = torch.nan
        save_file(tensors, weights)
    elif fault == "missing":
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    elif fault == "config":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["num_hidden_layers"] = 10**6
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    found = look("model", lambda: model.model(EngineConfig(model=str(folder)), folder))
    assert told in texts(found, Level.ERROR)


def test_options_that_the_model_cannot_keep(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_tiny(cache / "own"))
    for words, told in (
        (["--exits", "/no/such/file"], "no such file"),
        (["--max-model-len", "999999"], "positions"),
        (["--kv-cache-memory", "0.000001"], "K,V for one request"),
        (["--device", "cuda"], "--device cuda"),
    ):
        if told == "--device cuda" and torch.cuda.is_available():
            continue
        status, found = run(capsys, folder, *words)
        errors = [each["text"] for each in found["findings"] if each["level"] == "error"]
        assert status == 1
        assert any(told in text for text in errors)
    status, found = run(capsys, "/no/such/folder")
    assert status == 1
    assert "there is no folder" in named(found, "model")[0]["text"]


def test_memory_that_is_too_small(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    folder = write_tiny(cache / "own")
    config = EngineConfig(model=str(folder))
    for free, level in ((1.2 * GIB, Level.WARNING), (0.1 * GIB, Level.ERROR), (9 * GIB, Level.OK)):
        monkeypatch.setattr(model, "memory_available", lambda: free)  # noqa: B023
        (found,) = [
            each
            for each in look("model", lambda: model.model(config, folder))
            if each.name == "memory needed"
        ]
        assert found.level is level


def test_a_port_in_use_and_keys() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = look("address", lambda: serving.address(options(port=port)))
    assert "is in use" in texts(found, Level.ERROR)
    found = look("address", lambda: serving.address(options(host="0.0.0.0")))
    assert "set --api-key" in texts(found, Level.WARNING)
    found = look("address", lambda: serving.address(options(ssl_keyfile="k")))
    assert "--ssl-certfile" in texts(found, Level.ERROR)
    found = look("keys", lambda: serving.address(options(api_key_file="/no/such/keys")))
    assert "keys" in texts(found, Level.ERROR)


@pytest.mark.parametrize(("hard", "level"), [(100, Level.WARNING), (100_000, Level.OK)])
def test_few_open_files(hard: int, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (50, hard))
    (found,) = look("files", lambda: machine.files(options()))
    assert found.level is level


def test_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 64)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 1.5)
    found = look("processor", lambda: machine.processor(options(threads=8)))
    assert "use --threads 1" in texts(found, Level.WARNING)
    assert not texts(
        look("processor", lambda: machine.processor(options(threads=1))), Level.WARNING
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_control_groups(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  8192 kB\n"}
    second = write(
        tmp_path / "2",
        {
            **meminfo,
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/cpu.max": "150000 100000",
            "sys/fs/cgroup/a/memory.max": "3000000",
            "sys/fs/cgroup/a/memory.current": "1000000",
        },
    )
    assert (limits.cpu_quota(second), limits.memory_available(second)) == (1.5, 2000000)
    first = write(
        tmp_path / "1",
        {
            **meminfo,
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n3:memory:/x\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "500",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "900",
        },
    )
    assert (limits.cpu_quota(first), limits.memory_available(first)) == (2.0, 0)
    free = write(tmp_path / "0", meminfo)
    assert (limits.cpu_quota(free), limits.memory_available(free)) == (None, 8192 * 1024)
    shutil.rmtree(free)
    assert limits.memory_available(free) is None
