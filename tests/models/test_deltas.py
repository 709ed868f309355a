"""Files of low-rank deltas: what was saved comes back, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.kernels.weight_formats import WeightFormat, can_hold, int4_grid
from offramp.models.config import ModelConfig
from offramp.models.exits import deltas as module
from offramp.models.exits.deltas import (
    Deltas,
    DeltasError,
    apply_deltas,
    delta_paths,
    load_deltas,
    new_deltas,
    save_deltas,
    tuned_fingerprint,
)
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from tests.models.test_grid import on_grid

OWN = "a" * 32


@pytest.fixture(scope="module")
def config(tiny_dir: Path) -> ModelConfig:
    return config_from_hf(tiny_dir)


@pytest.fixture(scope="module")
def weights(tiny_dir: Path, config: ModelConfig) -> dict[str, Tensor]:
    return load_weights(tiny_dir, config, dtype=torch.float32)


@pytest.fixture
def deltas(weights: dict[str, Tensor], config: ModelConfig) -> Deltas:
    made = new_deltas(weights, config, fingerprint=OWN, rank=3, seed=0)
    for _, up in made.low.values():
        up.normal_(std=0.1)
    return made


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest file, so small that the tiny model's deltas need several."""
    limit = module._HEADER_BYTES + 4000
    monkeypatch.setattr(module, "PART_BYTES", limit)
    return limit


def test_deltas_come_back_in_parts(tmp_path: Path, deltas: Deltas, small_parts: int) -> None:
    exit_file = tmp_path / "new" / "exits.safetensors"
    paths = save_deltas(deltas, exit_file)
    assert len(paths) > 2
    assert paths[0].name == f"exits.deltas-1-of-{len(paths)}.safetensors"
    assert sorted(paths) == delta_paths(exit_file)
    assert all(path.stat().st_size <= small_parts for path in paths)
    loaded = load_deltas(list(reversed(paths)), fingerprint=OWN)
    stored = deltas.stored()
    assert (loaded.rank, loaded.fingerprint) == (3, OWN)
    assert set(loaded.low) == set(stored.low)
    for name, (down, up) in loaded.low.items():
        assert down.equal(stored.low[name][0])
        assert up.equal(stored.low[name][1])


def test_a_shorter_set_leaves_no_old_parts(
    tmp_path: Path, deltas: Deltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_file = tmp_path / "exits.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module, "PART_BYTES", module._HEADER_BYTES + 4000)
        assert len(save_deltas(deltas, exit_file)) > 1
    paths = save_deltas(deltas, exit_file)
    assert len(paths) == 1
    assert delta_paths(exit_file) == paths


def test_equal_deltas_give_equal_files(tmp_path: Path, deltas: Deltas) -> None:
    first = save_deltas(deltas, tmp_path / "a.safetensors")[0]
    again = save_deltas(deltas, tmp_path / "b.safetensors")[0]
    assert first.read_bytes() == again.read_bytes()


def test_merging_adds_the_product(weights: dict[str, Tensor], deltas: Deltas) -> None:
    merged = apply_deltas(weights, deltas)
    down, up = deltas.low["layers.2.down"]
    torch.testing.assert_close(merged["layers.2.down"], weights["layers.2.down"] + up @ down)
    assert merged["embed"] is weights["embed"]
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert {tensor.dtype for tensor in apply_deltas(half, deltas).values()} == {torch.bfloat16}


def test_sums_on_a_grid_are_rounded_to_it(
    tmp_path: Path, weights: dict[str, Tensor], deltas: Deltas
) -> None:
    """Where the original lies on one; the file says so, and the tuned model's name."""
    name, other = "layers.1.down", "layers.2.o"
    weights = weights | {name: on_grid(*weights[name].shape) / 8}
    rounding = replace(deltas, on_grid=True)
    assert tuned_fingerprint(rounding) != tuned_fingerprint(deltas)
    found = load_deltas(save_deltas(rounding, tmp_path / "e.safetensors"), fingerprint=OWN)
    assert found.on_grid
    merged = apply_deltas(weights, found)
    plain = apply_deltas(weights, replace(found, on_grid=False))
    assert can_hold(WeightFormat.INT4, merged[name])
    assert not can_hold(WeightFormat.INT4, plain[name])
    assert merged[other].equal(plain[other])
    level = int4_grid(weights[name])[1].float().amax()
    assert (merged[name] - weights[name]).abs().max() >= level / 2


def test_a_tuned_model_has_a_name_of_its_own(
    weights: dict[str, Tensor], deltas: Deltas, tmp_path: Path
) -> None:
    """Known from the original and the deltas alone, so the merged weights need not be read."""
    assert fingerprint(apply_deltas(weights, deltas)) != fingerprint(weights)
    name = tuned_fingerprint(deltas)
    loaded = load_deltas(save_deltas(deltas, tmp_path / "e.safetensors"), fingerprint=OWN)
    assert tuned_fingerprint(loaded) == name != OWN
    assert tuned_fingerprint(replace(deltas, fingerprint="b" * 32)) != name
    deltas.low["layers.0.o"][1][0, 0] += 1
    assert tuned_fingerprint(deltas) != name


def test_deltas_of_another_model_are_refused(
    tmp_path: Path, deltas: Deltas, weights: dict[str, Tensor]
) -> None:
    paths = save_deltas(deltas, tmp_path / "e.safetensors")
    with pytest.raises(DeltasError, match="another model"):
        load_deltas(paths, fingerprint="b" * 32)
    with pytest.raises(DeltasError, match="which the model does not have"):
        apply_deltas({"embed": weights["embed"]}, deltas)
    narrow = weights | {"layers.1.o": torch.zeros(64, 32)}
    with pytest.raises(DeltasError, match=r"layers\.1\.o have another shape"):
        apply_deltas(narrow, deltas)


def test_incomplete_or_mixed_sets_are_refused(
    tmp_path: Path, deltas: Deltas, small_parts: int
) -> None:
    paths = save_deltas(deltas, tmp_path / "a.safetensors")
    with pytest.raises(DeltasError, match=rf"parts 1 of {len(paths)} were given"):
        load_deltas(paths[:1], fingerprint=OWN)
    with pytest.raises(DeltasError, match="no files"):
        load_deltas([], fingerprint=OWN)
    deltas.low["layers.0.o"][1][0, 0] += 1
    others = save_deltas(deltas, tmp_path / "b.safetensors")
    with pytest.raises(DeltasError, match="different sets"):
        load_deltas([*paths[:1], *others[1:]], fingerprint=OWN)


def test_damaged_files_are_refused(tmp_path: Path, deltas: Deltas) -> None:
    path = save_deltas(deltas, tmp_path / "e.safetensors")[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DeltasError, match="cannot be read as deltas"):
        load_deltas([path], fingerprint=OWN)
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(DeltasError, match="digest differs"):
        load_deltas([path], fingerprint=OWN)
    path.unlink()
    with pytest.raises(DeltasError, match="cannot be read as deltas"):
        load_deltas([path], fingerprint=OWN)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("layers.0.o.up", torch.full((64, 3), torch.nan), "not numbers"),
        ("layers.0.o.up", None, "one factor is missing for layers.0.o"),
    ],
)
def test_wrong_tensors_are_refused(
    name: str, tensor: Tensor | None, told: str, tmp_path: Path, deltas: Deltas
) -> None:
    path = save_deltas(deltas, tmp_path / "e.safetensors")[0]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path, metadata)
    with pytest.raises(DeltasError, match=told):
        load_deltas([path], fingerprint=OWN)
    save_file(tensors, path, {"format": "something else"})
    with pytest.raises(DeltasError, match="does not hold deltas"):
        load_deltas([path], fingerprint=OWN)


def test_a_factor_larger_than_a_part_is_refused(
    tmp_path: Path, deltas: Deltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", module._HEADER_BYTES + 100)
    with pytest.raises(DeltasError, match="choose a lower rank"):
        save_deltas(deltas, tmp_path / "e.safetensors")
