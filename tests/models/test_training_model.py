"""The differentiable forward is the model that is served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp.models.exits.deltas import apply_deltas, new_deltas
from offramp.models.exits.training.data import Answer, lay_out
from offramp.models.exits.training.training_model import DenseModel
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer
from tests.models.small import FAMILIES, make

EXITS = (2, 3)


def ids_of(vocab: int, *lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(4)
    return [tuple(torch.randint(3, vocab, (n,), generator=generator).tolist()) for n in lengths]


@torch.inference_mode()
def served(model: Transformer, ids: tuple[int, ...]) -> dict[int, Tensor]:
    """States of every position by layer, as serving makes them."""
    layout = lay_out(model, [(0, Answer(ids[:1], (*ids[1:], 0)))])
    hidden, at = layout.hidden, {}
    for segment in model.segments:
        hidden = segment(hidden, layout.at, layout.cache)
        at[segment.first + len(segment)] = hidden
    return at


def padded(texts: list[tuple[int, ...]]) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[1] * (longest - len(text))] for text in texts])


def assert_equal_to_serving(folder: Path) -> None:
    config = config_from_hf(folder)
    weights = load_weights(folder, config, dtype=torch.float32)
    model = Transformer(config, weights, EXITS, 64)
    texts = ids_of(config.vocab_size, 23, 9, 40)
    with torch.no_grad():
        states = DenseModel(config, weights, 64)(padded(texts), EXITS)
    for row, text in enumerate(texts):
        theirs = served(model, text)
        for layer in EXITS:
            mine = states.at[layer][row, : len(text)]
            torch.testing.assert_close(mine, theirs[layer], rtol=1e-4, atol=1e-4)
        last = states.last[row, : len(text)]
        torch.testing.assert_close(last, theirs[config.num_layers], rtol=1e-4, atol=1e-4)


def test_dense_states_are_the_served_ones(tiny_dir: Path) -> None:
    assert_equal_to_serving(tiny_dir)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_covered(name: str, tmp_path: Path) -> None:
    make(FAMILIES[name], tmp_path)
    assert_equal_to_serving(tmp_path)


def test_low_rank_deltas_are_the_merged_weights(tiny_dir: Path) -> None:
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    deltas = new_deltas(weights, config, fingerprint="f" * 32, rank=4, seed=1)
    ids = padded(ids_of(320, 12, 20))
    with torch.no_grad():
        plain = DenseModel(config, weights, 64)(ids).last
        untouched = DenseModel(config, weights, 64, deltas.low)(ids).last
        for _, up in deltas.low.values():
            up.normal_(std=0.05)
        added = DenseModel(config, weights, 64, deltas.low)(ids).last
        merged = DenseModel(config, apply_deltas(weights, deltas), 64)(ids).last
    assert untouched.equal(plain)
    assert not torch.allclose(added, plain, rtol=0.1)
    torch.testing.assert_close(added, merged, rtol=1e-3, atol=1e-3)


def test_dropped_layers_are_passed_unchanged(tiny_dir: Path) -> None:
    """Sequences that keep all layers are as without dropout, others skip the dropped layer."""
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    model = DenseModel(config, weights, 64)
    ids = padded(ids_of(320, 15, 15, 15))
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[2, 1] = False
    keep[3] = False
    with torch.no_grad():
        whole, dropped = model(ids, (2, 3)), model(ids, (2, 3), keep)
    assert dropped.at[3][1].equal(dropped.at[2][1])
    torch.testing.assert_close(dropped.at[3][[0, 2]], whole.at[3][[0, 2]])
    assert dropped.last.equal(dropped.at[3])


def test_gradients_reach_every_delta(tiny_dir: Path) -> None:
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    deltas = new_deltas(weights, config, fingerprint="f" * 32, rank=4, seed=1)
    params = [factor for pair in deltas.low.values() for factor in pair]
    for param in params:
        param.data.normal_(std=0.1)
        param.requires_grad_(True)
    DenseModel(config, weights, 64, deltas.low)(padded(ids_of(320, 9, 14))).last.sum().backward()
    assert len(params) == 2 * 4 * 4
    for param in params:
        assert param.grad is not None
        assert param.grad.abs().sum() > 0


def test_reduced_precision_keeps_residuals_and_gradients(tiny_dir: Path) -> None:
    """As training on a GPU runs it: products in bf16, residuals and gradients in fp32."""
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    deltas = new_deltas(weights, config, fingerprint="f" * 32, rank=4, seed=1)
    params = [factor for pair in deltas.low.values() for factor in pair]
    for param in params:
        param.data.normal_(std=0.05)
        param.requires_grad_(True)
    model = DenseModel(config, weights, 64, deltas.low)
    ids, keep = padded(ids_of(320, 12, 20, 16)), torch.ones(4, 3, dtype=torch.bool)
    keep[2, 0] = False
    with torch.no_grad():
        exact = model(ids, (2,), keep)
    with torch.autocast("cpu", torch.bfloat16):
        states = model(ids, (2,), keep)
    assert states.last.dtype == states.at[2].dtype == torch.float32
    error = (states.last.detach() - exact.last).norm() / exact.last.norm()
    assert 0 < float(error) < 0.1
    states.last.square().mean().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in params)
