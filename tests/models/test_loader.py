from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from offramp.models.errors import CheckpointError, UnsupportedModel
from offramp.models.families import config_from_hf, sampling_defaults
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.transformer import Transformer

from .small import forward, new_cache

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama-biased-tied": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3-wide-heads": Qwen3Config(**SIZES, head_dim=16),
}


def save(hf: PreTrainedConfig, folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_config(hf)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **options)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return load_weights(folder, config_from_hf(folder), dtype=dtype)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("hf", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_tensor_arrives_fused(hf: PreTrainedConfig, tmp_path: Path) -> None:
    model = save(hf, tmp_path)
    config, weights = config_from_hf(tmp_path), load(tmp_path)
    used = {"embed": model.model.embed_tokens.weight, "final_norm": model.model.norm.weight}
    if not config.tie_word_embeddings:
        used["lm_head"] = model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        linears = {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "o": (attention.o_proj,),
            "gate_up": (mlp.gate_proj, mlp.up_proj),
            "down": (mlp.down_proj,),
        }
        for name, parts in linears.items():
            used[f"layers.{index}.{name}"] = torch.cat([part.weight for part in parts])
            if parts[0].bias is not None:
                used[f"layers.{index}.{name}_bias"] = torch.cat([part.bias for part in parts])
        used[f"layers.{index}.attn_norm"] = layer.input_layernorm.weight
        used[f"layers.{index}.mlp_norm"] = layer.post_attention_layernorm.weight
        if config.qk_norm:
            used[f"layers.{index}.q_norm"] = attention.q_norm.weight
            used[f"layers.{index}.k_norm"] = attention.k_norm.weight
    assert weights.keys() == used.keys()
    for name, expected in used.items():
        assert torch.equal(weights[name], expected), name


def test_sharded_bf16_equals_single_fp32(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    model = save(FAMILIES["llama"], whole).to(torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected, found = load(whole, torch.bfloat16), load(sharded, torch.bfloat16)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_fingerprint_ignores_precision_and_sees_change(tmp_path: Path) -> None:
    save(FAMILIES["qwen3-wide-heads"], tmp_path)
    full, half = load(tmp_path), load(tmp_path, torch.bfloat16)
    assert fingerprint(full) == fingerprint(half)
    assert len(fingerprint(full)) == 32
    half["layers.1.mlp_norm"][3] += 1
    assert fingerprint(full) != fingerprint(half)


def test_a_head_of_its_own_is_used_though_the_config_ties_it(tmp_path: Path) -> None:
    """As in transformers; a copy of the embedding is no head of its own."""
    save(FAMILIES["llama-biased-tied"], tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    copy = stored["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": copy.clone()}, path, {"format": "pt"})
    assert "lm_head" not in load(tmp_path)
    save_file({**stored, "lm_head.weight": copy + 1}, path, {"format": "pt"})
    weights = load(tmp_path)
    assert torch.equal(weights["lm_head"], copy + 1)
    config = config_from_hf(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits[0]
        model = Transformer(config, weights, (), 16)
        found = forward(model, new_cache(model), [(0, ids[0].tolist(), [0])])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ids_outside_the_vocabulary_end_nothing(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    vocab = config_from_hf(tmp_path).vocab_size
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, vocab, -1, 99999]}))
    assert config_from_hf(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
    ],
)
def test_scaled_positions_reach_further(
    rope: dict[str, Any], positions: int, tmp_path: Path
) -> None:
    save(LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **rope}), tmp_path)
    assert config_from_hf(tmp_path).max_position_embeddings == positions


def test_sampling_parameters_of_a_folder(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.7, "top_k": 20, "top_p": None, "min_p": True}))
    assert sampling_defaults(tmp_path) == {"temperature": 0.7, "top_k": 20.0}


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    calls: list[tuple[int, int]] = []
    weights = load_weights(
        tmp_path,
        config_from_hf(tmp_path),
        dtype=torch.float32,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, len(weights)) for done in range(1, len(weights) + 1)]


def test_missing_extra_and_misshapen_are_named(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    config = config_from_hf(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(4, 32)
    tensors["model.layers.0.adapter.weight"] = torch.zeros(1)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, config, dtype=torch.float32)
    assert str(caught.value) == (
        "weights do not match config.json: missing: model.norm.weight; "
        "unexpected: model.layers.0.adapter.weight; wrong: "
        "model.layers.0.self_attn.k_proj.weight (expected [16, 32], found [4, 32])"
    )


def test_long_lists_of_faults_are_capped(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    config = config_from_hf(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="and 13 more; unexpected: x"):
        load_weights(tmp_path, config, dtype=torch.float32)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    config = config_from_hf(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(type I8"):
        load_weights(tmp_path, config, dtype=torch.float32)


def test_copy_of_tied_head_is_ignored(tmp_path: Path) -> None:
    save(FAMILIES["llama-biased-tied"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head" not in load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not weights", b"\xff" * 64])
def test_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(tmp_path)


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        config_from_hf(tmp_path)
    save(FAMILIES["llama"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        load(tmp_path)


def test_broken_index_is_named(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json is not a valid index"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["BertForMaskedLM"]}, r"architectures\[0\] is 'BertForMaskedLM'.*Llama"),
        ({"architectures": None}, r"architectures\[0\] is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_unsupported_features_are_named(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    FAMILIES["llama"].save_pretrained(tmp_path)
    edit_config(tmp_path, **({"architectures": ["LlamaForCausalLM"]} | changes))
    with pytest.raises(UnsupportedModel, match=named):
        config_from_hf(tmp_path)


def test_mixed_attention_is_unsupported(tmp_path: Path) -> None:
    save(Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1), tmp_path)
    with pytest.raises(UnsupportedModel, match="layer_types"):
        config_from_hf(tmp_path)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("old_layout", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", ROPES, ids=[rope["rope_type"] for rope in ROPES])
def test_rope_equals_transformers(
    rope: dict[str, Any], *, old_layout: bool, tmp_path: Path
) -> None:
    hf = LlamaConfig(**SIZES, rope_parameters=rope | {"rope_theta": 5000.0})
    model = save(hf, tmp_path)
    if old_layout:
        path = tmp_path / "config.json"
        content = json.loads(path.read_text())
        del content["rope_parameters"]
        content |= {"rope_theta": 5000.0, "rope_scaling": rope}
        path.write_text(json.dumps(content))
    config, expected = config_from_hf(tmp_path), model.model.rotary_emb
    assert torch.equal(torch.tensor(config.inv_freq), expected.inv_freq)
    assert config.rope_scale == pytest.approx(expected.attention_scaling)


def test_generation_config_decides_the_ends_of_text(tmp_path: Path) -> None:
    save(FAMILIES["llama"], tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert config_from_hf(tmp_path).eos_token_ids == (5, 6)
    path.unlink()
    assert config_from_hf(tmp_path).eos_token_ids == (2,)


def test_tiny_model_takes_the_same_path(tiny_dir: Path) -> None:
    config, weights = config_from_hf(tiny_dir), load(tiny_dir)
    assert config.eos_token_ids == (2, 0)
    assert weights["embed"].shape == (config.vocab_size, config.hidden_size)
    assert fingerprint(weights) == "e6559260286984b91cbc870b5b62b7f4"
