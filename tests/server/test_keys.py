"""Keys: refused where they cannot be meant, and changed while the server runs."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

import httpx2
import pytest

from offramp.server import keys as keys_module
from offramp.server import serve
from offramp.server.config import ServerConfig
from offramp.server.keys import ApiKeyError, ApiKeys, is_loopback
from offramp.server.options import OptionError, build, from_environment, parse

from .fakes import PATIENCE_S
from .process import running

BROKEN = ("", " ", "a b", "a\n", "\ta", "a\x00", "a\x7f", "é", "key\r", "\u200b")


@pytest.mark.parametrize("key", BROKEN)
def test_a_key_that_nobody_could_send_is_refused_and_not_repeated(
    key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--api-key", "good", key], {})
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--api-key: a key must be" in said
    assert "good" not in said
    with pytest.raises(ApiKeyError):
        ApiKeys([key])


@pytest.mark.parametrize("text", ["", " ", ",", "a,", ",a", "a, ,b", "a b", "é"])
def test_a_variable_that_is_set_and_has_no_key_is_refused(text: str) -> None:
    """It was as if it were not set: the server was open."""
    with pytest.raises(OptionError, match="--api-key"):
        build(from_environment({"OFFRAMP_API_KEY": text}))


def test_keys_of_a_variable_are_between_commas() -> None:
    config = build(from_environment({"OFFRAMP_API_KEY": "one, two"}))
    assert config.api_key == ("one", "two")
    assert list(ApiKeys(config.api_key)) == [b"one", b"two"]


def test_a_file_has_a_key_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team a\none\n\n  two  \r\n#three\none\n", encoding="utf-8")
    found = ApiKeys(["zero"], path)
    assert list(found) == [b"zero", b"one", b"two"]
    assert found
    assert not ApiKeys()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has no key"),
        (b"# nothing\n\n", "it has no key"),
        (b"one\ntwo three\n", "line 2: a key must be"),
        (b"one\n\xc3\xa9\n", "line 2: a key must be"),
        (b"a\0b\n", "line 1: a key must be"),
        (b"x" * (1024**2 + 1), "more than"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_status_1(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    assert serve.run(ServerConfig(port=0, api_key_file=path)) == 1
    found = capsys.readouterr().err
    assert said in found
    assert str(path) in found
    assert found.count("\n") == 1
    assert "three" not in found


def test_a_pipe_or_a_folder_has_no_keys(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path()):
        with pytest.raises(ApiKeyError, match="no plain file"):
            ApiKeys((), path)


def test_a_file_is_read_again_when_it_changes_and_kept_while_it_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n", encoding="utf-8")
    found = ApiKeys((), path)
    with caplog.at_level(logging.INFO):
        found.refresh()
        assert caplog.text == ""
        path.write_text("two\nthree\n", encoding="utf-8")
        found.refresh()
        assert list(found) == [b"two", b"three"]
        assert "2 keys read" in caplog.text
        caplog.clear()
        path.unlink()
        for _ in range(3):
            found.refresh()
        assert list(found) == [b"two", b"three"]
        assert caplog.text.count("the keys before stay in force") == 1
        path.write_text("# none\n", encoding="utf-8")
        found.refresh()
        found.refresh()
        assert list(found) == [b"two", b"three"]
        assert caplog.text.count("the keys before stay in force") == 2
        path.write_text("four\n", encoding="utf-8")
        found.refresh()
        assert list(found) == [b"four"]
        assert "two" not in caplog.text


async def test_watching_looks_at_the_file_on_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "_LOOK_EVERY_S", 0.001)
    path = tmp_path / "keys"
    await asyncio.to_thread(path.write_text, "one\n")
    found = await asyncio.to_thread(ApiKeys, (), path)
    task = asyncio.create_task(found.watch())
    await asyncio.to_thread(path.write_text, "three\n")
    async with asyncio.timeout(PATIENCE_S):
        while list(found) != [b"three"]:  # noqa: ASYNC110 (nothing tells when it was read)
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await ApiKeys(["k"]).watch()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.3.4.5", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("fe80::1%eth0", False),
    ],
)
def test_addresses_of_this_machine(host: str, expected: bool) -> None:  # noqa: FBT001
    assert is_loopback(host) is expected


def test_keys_are_rotated_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n", encoding="utf-8")

    def status(url: str, key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.get(f"{url}/v1/models", headers=headers, timeout=PATIENCE_S).status_code

    with running("tiny", "--api-key-file", str(path), "--host", "0.0.0.0") as process:
        url = process.address().replace("0.0.0.0", "127.0.0.1")
        assert (status(url, "old"), status(url, "new")) == (200, 401)
        path.write_text("new\n", encoding="utf-8")
        deadline = time.monotonic() + PATIENCE_S
        while status(url, "new") != 200:
            assert time.monotonic() < deadline
        assert status(url, "old") == 401
    assert "no API key" not in process.log


def test_an_open_server_that_others_reach_says_so_once() -> None:
    with running("tiny", "--host", "0.0.0.0") as process:
        process.address()
    assert process.log.count("no API key: whoever reaches this address") == 1
    with running("tiny") as process:
        process.address()
    assert "no API key" not in process.log
