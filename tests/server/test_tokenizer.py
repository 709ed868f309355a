"""What folders and messages may hold, and what becomes of it as token ids."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from offramp.server.errors import OfframpError
from offramp.server.text.detokenizer import Detokenizer
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fakes import END, byte_backend, render

LONG = "a text that is longer than what its tokenizer.json allows"


def test_truncation_and_padding_of_a_file_are_not_for_prompts(tmp_path: Path) -> None:
    backend = byte_backend()
    backend.enable_truncation(8)
    backend.enable_padding(length=100)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert [len(ids) for ids in loaded.encode([LONG, "a"], 1000)] == [len(LONG), 1]


@pytest.mark.parametrize("text", ["a<end>b", "<end>", "<<end>>", "<end><end>"])
def test_names_of_special_tokens_in_messages_are_text(text: str) -> None:
    messages = [{"role": "user", "content": text}]
    ids = Tokenizer(byte_backend(), render).encode_chat(messages, 1000)
    assert END not in ids
    assert byte_backend().decode(ids, skip_special_tokens=False) == f"user:{text}\n"
    allowed = Tokenizer(byte_backend(), render, special_in_messages=True)
    assert END in allowed.encode_chat(messages, 1000)


def test_a_template_still_writes_special_tokens() -> None:
    tokenizer = Tokenizer(byte_backend(), lambda messages: f"<end>{messages[0]['content']}<end>")
    ids = tokenizer.encode_chat([{"role": "user", "content": "a<end>"}], 1000)
    assert (ids[0], ids[-1], ids.count(END)) == (END, END, 2)


def test_long_texts_are_encoded_alike() -> None:
    """They take another way, through the tokenizer's threads."""
    tokenizer = Tokenizer(byte_backend(), render)
    texts = [LONG * 1000, "a<end>b", LONG]
    assert tokenizer.encode_rendered(texts) == [
        tokenizer.encode_rendered([text])[0] for text in texts
    ]


def test_ids_of_special_names() -> None:
    assert Tokenizer(byte_backend(), render).special_ids(["a", "<end>"]) == (END,)


def llama_backend() -> Backend:
    """A decoder that drops the space with which a text begins, as Llama 2's."""
    backend = Backend(BPE(vocab={"<s>": 0, "▁Hello": 1, "▁world": 2, "!": 3}, merges=[]))
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


def test_a_completion_keeps_its_first_space() -> None:
    def text(behind: tuple[int, ...]) -> str:
        detokenizer = Detokenizer(llama_backend(), behind=behind)
        return "".join(map(detokenizer.push, (2, 2, 3))) + detokenizer.flush()

    assert text((0, 1)) == " world world!"
    assert text(()) == "world world!"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a":' * 100_000, '{"model": {"type": "BPE"}}']
)
def test_a_broken_tokenizer_is_told(tiny_dir: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(OfframpError, match=f"{folder} has no tokenizer that can be read"):
        Tokenizer.load(folder)
