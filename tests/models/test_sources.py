from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import requests
from transformers import AutoModelForCausalLM, AutoTokenizer

from offramp.models import shapes
from offramp.models.errors import ModelNotAvailable
from offramp.models.loading import pull
from offramp.models.loading.sources import resolve
from offramp.paths import cache_folder


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M-Instruct", "SMOLLM2-135M"])
def test_embedded_names_ignore_case(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pull, "pull", lambda name, cache: cache / name)
    assert resolve(name, cache=tmp_path) == tmp_path / "smollm2-135m"


def test_existing_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent-folder", "../absent"])
def test_absent_folder_is_not_sought_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    with pytest.raises(ModelNotAvailable, match="there is no folder"):
        resolve(name)


@pytest.mark.parametrize(
    "error", [OSError("no route"), httpx2.ReadTimeout("too slow"), requests.ConnectionError("cut")]
)
def test_hub_errors_name_the_model(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotAvailable, match=f"cannot get 'owner/name' from the hub: {error}"):
        resolve("owner/name")


def test_impossible_name_lists_what_there_is() -> None:
    with pytest.raises(ModelNotAvailable, match="not one of: smollm2-135m, tiny"):
        resolve("no such model!")


def test_hub_model_without_safetensors_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelNotAvailable, match="no safetensors"):
        resolve("owner/name")


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OFFRAMP_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    assert cache_folder(Path("chosen")) == Path("chosen")
    monkeypatch.delenv("OFFRAMP_CACHE_DIR")
    assert cache_folder().name == "offramp"


def test_tiny_generates_varied_text_in_transformers(tmp_path: Path) -> None:
    folder = resolve("tiny", cache=tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi é 12"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0].tolist()
    answer = ids[prompt["input_ids"].shape[1] :]
    assert len(set(answer)) > 30
    assert tokenizer.decode(answer).isprintable()
    assert tokenizer.decode(ids).startswith("<|im_start|>user\nHi é 12<|im_end|>\n")


def test_an_absent_gguf_file_is_not_sought_on_the_hub() -> None:
    for model in ("here/model.gguf", "/models/model.Q4.GGUF"):
        with pytest.raises(ModelNotAvailable, match="there is no file"):
            resolve(model)


def unwritable(*_: object, **__: object) -> Path:
    raise OSError(errno.EROFS, "Read-only file system")


def test_the_tiny_model_is_served_from_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = resolve("tiny", cache=tmp_path)
    monkeypatch.setattr(shapes, "write_tiny", unwritable)
    assert resolve("tiny", cache=tmp_path) == folder
    for name in sorted(path.name for path in folder.iterdir()):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ModelNotAvailable, match="Read-only file system"):
            resolve("tiny", cache=tmp_path)
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(ModelNotAvailable, match="Read-only file system"):
        resolve("tiny", cache=tmp_path)


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    folder = resolve("tiny", cache=tmp_path)
    old, new = folder / "tmpold", folder / "tmpnew"
    for path in (old, new):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    past = time.time() - 25 * 3600
    os.utime(old, (past, past))
    resolve("tiny", cache=tmp_path)
    assert (old.exists(), new.exists()) == (False, True)
