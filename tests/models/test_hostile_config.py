"""Numbers of config.json that nobody means: one line, and no crash of the C kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .hostile import Loader, copy_of, loader

COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
HUGE = (2**31 - 1, 2**31, 2**32, 2**63, 10**9, 10**18, 10**30)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def process() -> Iterator[Loader]:
    with loader() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(tiny_dir, tmp_path_factory.mktemp("hostile") / "model")


def spoil(tiny: Path, folder: Path, changes: dict[str, Any]) -> Path:
    content = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**content, **changes})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("window", [*HUGE, 2**31 + 5])
def test_a_window_beyond_every_text_is_none(
    process: Loader, tiny_dir: Path, folder: Path, window: int
) -> None:
    """2^31 was a negative int32 in the kernels, and ended the first request in a crash."""
    kind, value = process.load(spoil(tiny_dir, folder, {"sliding_window": window}))
    assert kind == ("answered" if window < 2**63 else "refused")
    assert kind == "answered" or "sliding_window" in value


BROKEN: list[tuple[str, Any]] = [
    *((name, value) for name in COUNTS for value in (0, -1, 10**9, 10**18, "4", 2.5, True, [4])),
    *(("sliding_window", value) for value in (0, -1, -(2**31), "9", 1.5, [2])),
    *(("rms_norm_eps", value) for value in (float("nan"), float("inf"), 0.0, -1e-5, 1e-46, "1")),
    *(("rope_theta", value) for value in (0.0, -1.0, float("nan"), 1e999, "x", [1])),
    *(("factor", value) for value in (0.0, -2.0, float("nan"), 1e999, "x", 1e300)),
    ("num_hidden_layers", 10**6),
    ("max_position_embeddings", 2**24 + 1),
    ("hidden_size", 65),
    ("num_key_value_heads", 3),
    ("eos_token_id", "end"),
    ("eos_token_id", [1.5]),
    ("layer_types", 7),
    ("layer_types", [["full_attention"]] * 4),
    ("architectures", [["LlamaForCausalLM"]]),
    ("model_type", "bert"),
    ("rope_parameters", [1]),
    ("rope_parameters", {"full_attention": ROPE}),
    ("tie_word_embeddings", "no"),
    ("hidden_act", 5),
]


@pytest.mark.parametrize(("name", "value"), BROKEN)
def test_what_no_model_has_is_refused_by_name(
    process: Loader, tiny_dir: Path, folder: Path, name: str, value: Any
) -> None:
    changes = {name: value}
    if name == "rope_theta":
        changes = {"rope_parameters": {**ROPE, name: value}}
    elif name == "factor":
        changes = {"rope_parameters": {**ROPE, "rope_type": "linear", name: value}}
    said = process.refusal(spoil(tiny_dir, folder, changes))
    assert (
        name in said
        or name.replace("_", " ") in said
        or "do not match" in said
        or "is not valid JSON" in said
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_p": 1e999}, "Infinity is no number"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ([], "JSON object"),
    ],
)
def test_generation_config_is_checked_too(
    process: Loader, tiny_dir: Path, tmp_path: Path, content: Any, said: str
) -> None:
    folder = copy_of(tiny_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    assert said in process.refusal(folder)


def test_a_config_nested_without_end_is_no_json(
    process: Loader, tiny_dir: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_dir, tmp_path / "model")
    (folder / "config.json").write_text('{"a":' * 200_000, encoding="utf-8")
    assert "nested too deeply" in process.refusal(folder)


def test_code_of_a_folder_is_neither_run_nor_asked_about(
    process: Loader, tiny_dir: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_dir, tmp_path / "model")
    (folder / "own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.T", "own.T"]}}
    assert "model_type" in process.refusal(spoil(tiny_dir, folder, {**own, "model_type": "own"}))
    assert process.load(spoil(tiny_dir, folder, own))[0] == "answered"


numbers = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 4, 16, 48, 64, 128, 2047, 2048, *HUGE]),
    st.sampled_from([float("nan"), float("inf"), 0.0, 1e-320, 1e-5, 0.5, 1.0, 1e4, 1e308]),
    st.integers(-(2**65), 2**65),
)
anything = st.one_of(
    numbers,
    st.sampled_from([None, True, "", "4", "nan", [], {}, [1], {"rope_type": "yarn"}]),
)
ROPE_NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor"),
    "original_max_position_embeddings",
)
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", 3, None])},
    optional=dict.fromkeys(ROPE_NUMBERS, anything),
)
changes = st.dictionaries(
    st.sampled_from(
        [
            *COUNTS,
            *("sliding_window", "rms_norm_eps", "eos_token_id", "bos_token_id", "layer_types"),
            *("attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act", "num_labels"),
            *("id2label", "use_sliding_window", "max_window_layers", "rope_theta", "dtype"),
            *("quantization_config", "model_type", "pretraining_tp", "pad_token_id"),
        ]
    ),
    anything,
    max_size=2,
)


@settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    changes=changes, rope=st.one_of(st.none(), ropes), family=st.sampled_from(["llama", "qwen2"])
)
def test_any_config_is_refused_or_served(
    process: Loader,
    tiny_dir: Path,
    folder: Path,
    changes: dict[str, Any],
    rope: dict[str, Any] | None,
    family: str,
) -> None:
    if family == "qwen2":
        changes = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **changes}
    if rope is not None:
        changes = {**changes, "rope_parameters": rope}
    process.load(spoil(tiny_dir, folder, changes))
