"""A model's configuration, read by us and by transformers: the same values for the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from offramp.models.errors import CheckpointError, UnsupportedModel
from offramp.models.families import FAMILIES, config_from_hf

NEEDED = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}

ropes = st.one_of(
    st.none(),
    st.just({"rope_type": "default"}),
    st.builds(
        lambda factor: {"rope_type": "linear", "factor": factor}, st.sampled_from([1.0, 2.0, 8.0])
    ),
    st.builds(
        lambda factor, low, original: {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": 4.0,
            **original,
        },
        st.sampled_from([2.0, 8.0, 32.0]),
        st.sampled_from([0.5, 1.0]),
        st.sampled_from([{}, {"original_max_position_embeddings": 64}]),
    ),
    st.builds(
        lambda factor, original, more: {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **more,
        },
        st.sampled_from([1.0, 4.0, 16.0]),
        st.sampled_from([32, 4096]),
        st.sampled_from(
            [
                {},
                {"attention_factor": 0.7},
                {"beta_fast": 16.0, "beta_slow": 2.0},
                {"mscale": 1.0, "mscale_all_dim": 0.5},
                {"truncate": False},
            ]
        ),
    ),
)
optional = st.fixed_dictionaries(
    {},
    optional={
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([8, 16, 32]),
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
        "max_position_embeddings": st.sampled_from([128, 4096, 131072]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "hidden_act": st.just("silu"),
        "eos_token_id": st.sampled_from([0, 7, [3, 4], None]),
        "sliding_window": st.sampled_from([None, 32, 4096, 2**31]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.sampled_from([0, 4, 28]),
        "partial_rotary_factor": st.just(1.0),
    },
)


def rotary(hf: Any) -> tuple[tuple[float, ...], float]:
    kind = hf.rope_parameters["rope_type"]
    find: Any = (
        LlamaRotaryEmbedding.compute_default_rope_parameters
        if kind == "default"
        else ROPE_INIT_FUNCTIONS[kind]
    )
    frequencies, scale = find(hf)
    return tuple(frequencies.tolist()), float(scale)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    fields=optional,
    rope=ropes,
    theta=st.sampled_from([None, 10000.0, 500000.0]),
    old=st.booleans(),
)
def test_every_field_is_what_transformers_finds(
    family: str,
    fields: dict[str, Any],
    rope: dict[str, Any] | None,
    theta: float | None,
    *,
    old: bool,
    tmp_path: Path,
) -> None:
    row = FAMILIES[family]
    content: dict[str, Any] = {**NEEDED, **fields, "architectures": [family]}
    if row.kv_heads is not None:
        content.setdefault("num_key_value_heads", 4)
    if rope is not None and old:
        content["rope_scaling"] = rope
        content |= {} if theta is None else {"rope_theta": theta}
    elif rope is not None:
        content["rope_parameters"] = {**rope, **({} if theta is None else {"rope_theta": theta})}
    (tmp_path / "config.json").write_text(json.dumps(content))
    hf: Any = AutoConfig.for_model(row.model_type, **json.loads(json.dumps(content)))
    ours = config_from_hf(tmp_path)
    assert ours.num_kv_heads == hf.num_key_value_heads
    assert ours.head_dim == (getattr(hf, "head_dim", None) or 16)
    assert ours.rms_norm_eps == hf.rms_norm_eps
    assert ours.tie_word_embeddings == hf.tie_word_embeddings
    assert (ours.inv_freq, ours.rope_scale) == rotary(hf)
    if hf.rope_parameters["rope_type"] not in ("linear", "yarn"):
        assert ours.max_position_embeddings == hf.max_position_embeddings
    window = hf.sliding_window if hasattr(hf, "sliding_window") else fields.get("sliding_window")
    if set(getattr(hf, "layer_types", None) or ()) == {"full_attention"}:
        window = None
    inside = window is not None and window < ours.max_position_embeddings
    assert ours.sliding_window == (window if inside else None)
    end = hf.eos_token_id
    assert ours.eos_token_ids == tuple(end if isinstance(end, list) else [end] * (end is not None))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    row = FAMILIES[family]
    hf: Any = AutoConfig.for_model(row.model_type)
    assert row.positions == hf.max_position_embeddings
    assert row.kv_heads == (None if row.model_type == "llama" else hf.num_key_value_heads)
    assert row.head_dim == (getattr(hf, "head_dim", None) if row.model_type == "qwen3" else None)
    assert row.end == hf.eos_token_id


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_size_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    content = {**NEEDED, "architectures": ["LlamaForCausalLM"]}
    del content[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        config_from_hf(tmp_path)


def test_heads_must_share_the_hidden_size(tmp_path: Path) -> None:
    content = {**NEEDED, "architectures": ["LlamaForCausalLM"], "num_attention_heads": 5}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModel, match="hidden_size is 64"):
        config_from_hf(tmp_path)


@pytest.mark.parametrize("lacking", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_rope_field_that_is_not_there_is_named(lacking: str, tmp_path: Path) -> None:
    rope = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    del rope[lacking]
    content = {
        **NEEDED,
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {"rope_type": "llama3", **rope},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"llama3 lack {lacking}"):
        config_from_hf(tmp_path)
