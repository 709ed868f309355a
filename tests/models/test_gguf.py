"""GGUF files as models: the same weights, configuration and tokens as the folders they came of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import requests
import torch
import xllamacpp
from gguf.quants import dequantize
from safetensors.numpy import save_file

from offramp.kernels.weight_formats import WeightFormat, can_hold, first_to_hold
from offramp.models.config import ModelConfig, Weights
from offramp.models.errors import CheckpointError, ModelNotAvailable, UnsupportedModel
from offramp.models.families import config_from_hf
from offramp.models.loading import gguf_folder
from offramp.models.loading.formats import RoundedWeights, choose, rounded
from offramp.models.loading.gguf_folder import folder_of
from offramp.models.loading.gguf_weights import INDEX, GgufFile
from offramp.models.loading.safetensors import StoredWeights, fingerprint, load_weights
from offramp.models.loading.sources import find, resolve
from offramp.models.rope import plain_inv_freq
from offramp.server.bench.reference import agreement, load_judge
from offramp.server.bench.targets import Transformers
from offramp.server.text.tokenizer import Tokenizer

from .gguf_files import TOKENS, Array, Wish, random_weights, write_gguf
from .test_tokenizer_ids import TEXTS

Q = gguf.GGMLQuantizationType
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=float(np.float32(1e-5)),
    inv_freq=plain_inv_freq(10000.0, 16),
    max_position_embeddings=256,
    tie_word_embeddings=True,
    eos_token_ids=(0, 2),
)
QWEN = {"attention_bias": True, "tie_word_embeddings": False}
FAMILIES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"architecture": "LlamaForCausalLM"}, {}),
    "mistral": (
        "llama",
        {"architecture": "MistralForCausalLM", "sliding_window": 8},
        {".attention.sliding_window": 8},
    ),
    "qwen2": ("qwen2", {"architecture": "Qwen2ForCausalLM", **QWEN}, {}),
    "qwen3": ("qwen3", {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "head_dim": 32}, {}),
}


def config_of(**changes: Any) -> ModelConfig:
    changed = dataclasses.replace(CONFIG, **changes)
    return dataclasses.replace(changed, inv_freq=plain_inv_freq(10000.0, changed.head_dim))


def write(path: Path, wish: Wish | None = None, config: ModelConfig = CONFIG) -> dict[str, Array]:
    weights = random_weights(config)
    write_gguf(path, config, weights, wish)
    return weights


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_read_as_they_were_written(name: str, tmp_path: Path) -> None:
    arch, changes, values = FAMILIES[name]
    config = config_of(**changes)
    weights = write(tmp_path / "m.gguf", Wish(arch=arch, values=values), config)
    folder = resolve(str(tmp_path / "m.gguf"), cache=tmp_path)
    assert config_from_hf(folder) == config
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(weights, plain / "model.safetensors")
    theirs = load_weights(plain, config, dtype=torch.float32)
    ours = StoredWeights(folder, config, dtype=torch.float32)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    assert not ours.quantized
    assert fingerprint(ours) == fingerprint(theirs)
    assert find(str(tmp_path / "m.gguf"), cache=tmp_path) == folder


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_transformers(name: str, tmp_path: Path) -> None:
    """Of the configuration and weights as they were read, by its own model of the family."""
    arch, changes, values = FAMILIES[name]
    write(tmp_path / "m.gguf", Wish(arch=arch, values=values), config_of(**changes))
    folder = resolve(str(tmp_path / "m.gguf"), cache=tmp_path)
    prompts = [(5, 6, 7, 8), (9, 10)]
    answers = Transformers(folder).run(prompts, mode="off", concurrency=1, max_tokens=40)
    assert agreement(load_judge(folder, 100), answers) == 1


def test_some_rows_of_a_fused_matrix_are_those_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Wish(stored=lambda _: Q.Q8_0))
    stored = StoredWeights(
        resolve(str(tmp_path / "m.gguf"), cache=tmp_path), CONFIG, dtype=torch.float32
    )
    rows = [0, 1, 31, 63, 64, 80, 95, 96, 127]
    assert torch.equal(stored.rows("layers.1.qkv", rows), stored["layers.1.qkv"][rows])
    assert fingerprint(stored) == fingerprint(dict(stored))


class TestFormats:
    """In which formats weights are kept."""

    @pytest.mark.parametrize(
        ("kind", "form"),
        [(Q.Q4_0, "int4"), (Q.Q4_1, "int4"), (Q.Q8_0, "int8"), (Q.F16, "fp16"), (Q.F32, "fp16")],
    )
    def test_types_that_a_format_holds(self, kind: Any, form: str, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", Wish(stored=lambda _: kind))
        stored = StoredWeights(
            resolve(str(tmp_path / "m.gguf"), cache=tmp_path), CONFIG, dtype=torch.float32
        )
        weights = rounded(Weights.AUTO, stored, quantized=stored.quantized)
        recipes = choose(Weights.AUTO, weights)
        for name in ("layers.0.qkv", "layers.1.down"):
            assert first_to_hold(recipes.layers, weights[name]) is WeightFormat(form)
        assert not (isinstance(weights, RoundedWeights) and weights.changed)

    def test_five_bits_are_rounded_to_eight(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", Wish(stored=lambda _: Q.Q5_1))
        stored = StoredWeights(
            resolve(str(tmp_path / "m.gguf"), cache=tmp_path), CONFIG, dtype=torch.float32
        )
        weights = rounded(Weights.AUTO, stored, quantized=stored.quantized)
        assert isinstance(weights, RoundedWeights)
        assert (
            first_to_hold(choose(Weights.AUTO, weights).layers, weights["layers.0.o"])
            is WeightFormat.INT8
        )
        assert "layers.0.o" in weights.changed
        assert 0 < weights.error < 0.01
        for plain in (
            rounded(Weights.FP32, stored, quantized=True),
            rounded(Weights.AUTO, stored, quantized=True, native=False),
        ):
            assert plain is stored

    def test_blocks_with_scales_of_their_own_keep_their_levels(self) -> None:
        """Q4_K: 17 bits of scale become 11, no level moves."""
        weight = super_blocks(Q.Q4_K, rows=16)
        assert can_hold(WeightFormat.INT4, weight)
        # What lies between the levels does not.
        levels = weight[3, :32].unique()
        weight[3, 5] += 0.5 * levels.diff().min()
        assert not can_hold(WeightFormat.INT4, weight)

    def test_six_bits_lie_on_no_grid(self) -> None:
        assert not can_hold(WeightFormat.INT4, super_blocks(Q.Q6_K, rows=8))


def super_blocks(kind: Any, rows: int) -> torch.Tensor:
    """Random weights of one of ggml's types with blocks of 256, [rows, 256]."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(1)
    data = random.integers(0, 256, (rows, length), np.uint8)
    scales = (random.random((rows, 2)) * 1e-2 + 1e-3).astype(np.float16).view(np.uint8)
    if kind is Q.Q4_K:
        data[:, :4] = scales
    else:
        data[:, -2:] = scales[:, :2]
    return torch.from_numpy(dequantize(data, kind)).view(rows, size)


@pytest.fixture(scope="module", params=["smollm", "qwen2", "deepseek-r1-qwen", "llama-bpe"])
def both(
    request: pytest.FixtureRequest, smollm2_dir: Path, tmp_path_factory: Any
) -> Iterator[tuple[Tokenizer, str]]:
    """Ours of a file with SmolLM2's vocabulary, and the address of llama.cpp's."""
    home = tmp_path_factory.mktemp("gguf")
    model = json.loads((smollm2_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in model["merges"]]
    config = config_of(vocab_size=len(tokens))
    write(home / "v.gguf", Wish(pre=request.param, tokens=tokens, merges=merges), config)
    params = xllamacpp.CommonParams()
    params.model.path = str(home / "v.gguf")
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    yield Tokenizer.load(folder_of(home / "v.gguf", home)), server.listening_address
    del server


class TestTokenizer:
    """The vocabulary, and how text is cut."""

    @pytest.mark.weights
    def test_ids_are_llama_cpps(self, both: tuple[Tokenizer, str]) -> None:
        ours, address = both
        for text in TEXTS:
            body = {"content": text, "add_special": False, "parse_special": False}
            theirs = requests.post(f"{address}/tokenize", json=body, timeout=10).json()["tokens"]
            assert list(ours.encode([text], 1000)[0]) == theirs, text

    def test_chat_template_and_ends(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf")
        folder = resolve(str(tmp_path / "m.gguf"), cache=tmp_path)
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}], 100)
        assert list(ids) == [1, TOKENS.index("hell"), TOKENS.index("o"), 2]
        assert config_from_hf(folder).eos_token_ids == (0, 2)

    @pytest.mark.parametrize("add_bos", [False, True])
    def test_texts_begin_as_the_file_says(self, tmp_path: Path, *, add_bos: bool) -> None:
        write(tmp_path / "m.gguf", Wish(add_bos=add_bos))
        tokenizer = Tokenizer.load(resolve(str(tmp_path / "m.gguf"), cache=tmp_path))
        assert tokenizer.encode(["he"], 10)[0][0] == (1 if add_bos else TOKENS.index("he"))


class TestRefused:
    """What is not implemented is named."""

    @pytest.mark.parametrize(
        ("wish", "words"),
        [
            (Wish(arch="gemma2"), "general.architecture is 'gemma2'"),
            (Wish(pre="tekken"), "tokenizer.ggml.pre is 'tekken'"),
            (Wish(pre=None), "tokenizer.ggml.pre is None"),
            (Wish(model="llama"), "tokenizer.ggml.model is 'llama'"),
            (Wish(values={".expert_count": 8}), "expert_count is 8"),
            (Wish(values={"split.count": 3}), "split.count is 3; supported: 1"),
            (Wish(values={".rope.scaling.type": "longrope"}), "'longrope'"),
            (
                Wish(arch="qwen3", values={".attention.sliding_window": 8}),
                "qwen3.attention.sliding_window is 8",
            ),
            (
                Wish(tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}),
                "rope_freqs.weight",
            ),
        ],
        ids=lambda each: each if isinstance(each, str) else "",
    )
    def test_models(self, wish: Wish, words: str, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", wish)
        with pytest.raises(UnsupportedModel) as error:
            resolve(str(tmp_path / "m.gguf"), cache=tmp_path)
        assert words in str(error.value)
        # Nothing half made is found the next time.
        assert not list((tmp_path / "models").rglob("gguf.json"))

    @pytest.mark.parametrize("content", [b"", b"GGUF", b"no such file at all" * 9, "cut"])
    def test_files(self, content: bytes | str, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        if content == "cut":
            write(path)
            content = path.read_bytes()[:-1000]
        assert isinstance(content, bytes)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.gguf is no GGUF file that can be read"):
            resolve(str(path), cache=tmp_path)

    def test_damaged_metadata(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever a few wrong bytes make of the file, the error can be shown to a user."""
        monkeypatch.setattr(gguf_folder, "_write_tokenizer", lambda *_: None)
        write(tmp_path / "m.gguf")
        whole, refused = (tmp_path / "m.gguf").read_bytes(), 0
        random = np.random.default_rng(3)
        for number in range(150):
            content = np.frombuffer(whole, np.uint8).copy()
            places = random.integers(0, 3000, random.integers(1, 4))
            content[places] = random.choice([0, 1, 128, 255], len(places))
            path = tmp_path / f"{number}.gguf"
            path.write_bytes(content.tobytes())
            try:
                folder_of(path, tmp_path / "cache")
            except (CheckpointError, UnsupportedModel):
                refused += 1
        assert 50 < refused < 150

    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotAvailable, match="there is no file"):
            resolve(str(tmp_path / "absent.gguf"), cache=tmp_path)

    def test_weights_that_are_missing(self, tmp_path: Path) -> None:
        weights = random_weights(CONFIG)
        del weights["model.layers.1.mlp.up_proj.weight"]
        write_gguf(tmp_path / "m.gguf", CONFIG, weights)
        folder = resolve(str(tmp_path / "m.gguf"), cache=tmp_path)
        with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.up_proj"):
            StoredWeights(folder, CONFIG, dtype=torch.float32)

    def test_biases_that_no_family_has(self, tmp_path: Path) -> None:
        extra = {"blk.0.ffn_up.bias": np.zeros(96, np.float32)}
        write(tmp_path / "m.gguf", Wish(tensors=extra))
        folder = resolve(str(tmp_path / "m.gguf"), cache=tmp_path)
        with pytest.raises(CheckpointError, match="unexpected"):
            StoredWeights(folder, CONFIG, dtype=torch.float32)


class TestRope:
    """Frequencies that are stretched."""

    def test_factors_of_llama_3(self, tmp_path: Path) -> None:
        config = config_of(max_position_embeddings=131_072)
        rope = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
        plain = tmp_path / "plain"
        plain.mkdir()
        wish = Wish(values={".rope.scaling.type": "none"})
        write(plain / "m.gguf", wish, config)
        there = folder_of(plain / "m.gguf", plain)
        content = json.loads((there / "config.json").read_text())
        content["rope_parameters"] |= {"rope_type": "llama3", **rope}
        (there / "config.json").write_text(json.dumps(content))
        wanted = config_from_hf(there).inv_freq
        factors = np.array(config.inv_freq, np.float32) / np.array(wanted, np.float32)
        assert factors.max() > factors.min() == 1
        write(tmp_path / "m.gguf", Wish(tensors={"rope_freqs.weight": factors}), config)
        found = config_from_hf(resolve(str(tmp_path / "m.gguf"), cache=tmp_path))
        assert np.allclose(found.inv_freq, wanted, rtol=1e-6)

    @pytest.mark.parametrize(("kind", "reach"), [("linear", 1024), ("yarn", 512)])
    def test_factors_of_all(self, kind: str, reach: int, tmp_path: Path) -> None:
        values: dict[str, Any] = {".rope.scaling.type": kind, ".rope.scaling.factor": 4.0}
        if kind == "yarn":
            values[".rope.scaling.original_context_length"] = 128
        write(tmp_path / "m.gguf", Wish(values=values))
        found = config_from_hf(resolve(str(tmp_path / "m.gguf"), cache=tmp_path))
        assert found.max_position_embeddings == reach
        assert found.inv_freq[-1] == pytest.approx(CONFIG.inv_freq[-1] / 4)


class TestFolder:
    """The folder that is made of a file."""

    def test_it_is_made_once_and_follows_the_file(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf")
        first = folder_of(tmp_path / "m.gguf", tmp_path / "cache")
        stamp = (first / "tokenizer.json").stat().st_mtime_ns
        assert folder_of(tmp_path / "m.gguf", tmp_path / "cache") == first
        assert (first / "tokenizer.json").stat().st_mtime_ns == stamp
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "m.gguf").rename(tmp_path / "elsewhere" / "m.gguf")
        with pytest.raises(CheckpointError, match="cannot be read"):
            StoredWeights(first, CONFIG, dtype=torch.float32)
        again = folder_of(tmp_path / "elsewhere" / "m.gguf", tmp_path / "cache")
        StoredWeights(again, CONFIG, dtype=torch.float32)

    def test_a_file_that_goes_while_it_is_read(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf")
        stored = GgufFile(folder_of(tmp_path / "m.gguf", tmp_path / "cache") / INDEX)
        norm = stored.get_slice("model.norm.weight")
        assert torch.equal(norm[2:4], norm[:][2:4])
        (tmp_path / "m.gguf").unlink()
        with pytest.raises(CheckpointError, match="cannot read"):
            norm[:]

    def test_another_file_under_the_same_name_is_another_model(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf")
        first = folder_of(tmp_path / "m.gguf", tmp_path / "cache")
        write(tmp_path / "m.gguf", config=config_of(num_layers=1))
        with pytest.raises(CheckpointError, match="has changed"):
            StoredWeights(first, CONFIG, dtype=torch.float32)
        assert folder_of(tmp_path / "m.gguf", tmp_path / "cache") != first

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf")
        (tmp_path / "models").write_text("in the way")
        with pytest.raises(ModelNotAvailable, match="cannot keep the model's settings"):
            resolve(str(tmp_path / "m.gguf"), cache=tmp_path)
