"""The converted SmolLM2 tokenizer against llama.cpp's own implementation of the same rule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import gguf
import numpy as np
import pytest
import requests
import xllamacpp
from transformers import AutoTokenizer, PreTrainedTokenizerBase

pytestmark = pytest.mark.weights

TEXTS = [
    "Hello, world!",
    "a\n\n1.",
    "x  12",
    "    42",
    "½ cup, ⅔ full, Ⅳ and ²",
    "1234567890",
    "3.14159e-10",
    "2026-11-22T03:48:05Z",
    "1 2  3   4    5",
    "\t\t7\n\n\n8",
    "v1.2.3-rc4+build.56",
    "٣٤٥ ६७ 四五",
    "a1b22c333",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "for (int i = 0; i < 10; ++i) {\n\tsum += a[i];\n}\n",
    "<html>\n  <body class='x'>&amp;</body>\n</html>",
    '{"a": [1, 2, {"b": null}]}',
    "SELECT * FROM t WHERE id=42;",
    "\\frac{1}{2} \\alpha_{10}",
    "👋🏽 hi 👨‍👩‍👧‍👦 🏳️‍🌈",
    "🇫🇷🇩🇪",
    "日本語のテキスト、句読点。",
    "中文测试123中文",
    "한국어 띄어쓰기 2024년",
    "Привет, как дела?",
    "مرحبا بالعالم",
    "हिन्दी में पाठ",
    "Ελληνικά",
    "naïve café déjà-vu",
    "e\u0301 versus \u00e9",
    "zero\u200bwidth\u00a0nbsp",
    "I'm you're we've they'll it's he'd DON'T",
    "'s 't 're",
    "   leading and trailing   ",
    "\n",
    "\r\n\r\nwindows\r\n",
    " ",
    "  ",
    "tabs\tand  double  spaces",
    "CamelCaseHTTPServerError404",
    "snake_case_name_2",
    "https://example.com/path?q=1&r=%20#frag",
    "user@example.com",
    "...!!!???",
    "\u0000\u0007\u001b[31m",
    "ﬁﬂ ＦＵＬＬ １２３",
    "supercalifragilisticexpialidocious",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def write_vocabulary(tokenizer_json: Path, path: Path) -> None:
    """A GGUF with our tokens and merges, llama.cpp's ``smollm`` rule and the smallest model."""
    model = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    tokens = sorted(model["model"]["vocab"], key=model["model"]["vocab"].__getitem__)
    special = {token["content"] for token in model["added_tokens"]}
    kinds = [
        gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama_cpp(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of llama.cpp's own server, which alone exposes its tokenizer."""
    path = tmp_path_factory.mktemp("llama") / "vocabulary.gguf"
    write_vocabulary(smollm2_dir / "tokenizer.json", path)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 128
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm2_dir)
    return loaded


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_equal_llama_cpp(text: str, llama_cpp: str, tokenizer: PreTrainedTokenizerBase) -> None:
    body = {"content": text, "add_special": False, "parse_special": False}
    reply = requests.post(f"{llama_cpp}/tokenize", json=body, timeout=10)
    assert tokenizer.encode(text, add_special_tokens=False) == reply.json()["tokens"]


def test_chat_template_keeps_its_specials(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi 12"}], add_generation_prompt=True, return_dict=False
    )
    assert isinstance(ids, list)
    text = tokenizer.decode(cast("list[int]", ids))
    assert isinstance(text, str)
    assert text.endswith("<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")
    assert [sum(token == special for token in ids) for special in (1, 2)] == [3, 2]
