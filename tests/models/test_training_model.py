"""The differentiable forward is the model that is served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp.kernels.kv_fill import project_kv
from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rows import HostRows, Span
from offramp.models.exits.deltas import apply_deltas, new_deltas
from offramp.models.exits.training.data import Answer, lay_out
from offramp.models.exits.training.training_model import DenseModel, Left
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import KVCache
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer, identity_projection
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


def leave(
    model: DenseModel, ids: Tensor, rows: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """States after layer 2 and at the end when ``rows`` leave there; and what filled their K,V."""
    hidden = model.run(model.embedded(ids), 0, 2)
    mask = torch.zeros(ids.numel(), dtype=torch.bool)
    mask[rows] = True
    normed = rms_norm(hidden.flatten(0, 1)[rows], None, model.config.rms_norm_eps)
    parts = dict(zip((2, 3), (normed @ weight.t()).chunk(2, dim=-1), strict=True))
    left = Left(rows, mask.view(*ids.shape, 1), parts)
    return hidden, model.run(hidden, 2, 4, None, left), parts


def test_tokens_that_left_stay_as_they_are(tiny_dir: Path) -> None:
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    model = DenseModel(config, weights, 64)
    ids = padded(ids_of(320, 12, 12))
    rows = torch.tensor([5, 6, 12 + 3])
    weight, _ = identity_projection(Transformer(config, weights, (2,), 64), 2)
    with torch.no_grad():
        whole = model(ids).last
        at_exit, end, _ = leave(model, ids, rows, weight)
    assert end.flatten(0, 1)[rows].equal(at_exit.flatten(0, 1)[rows])
    # Nobody looks ahead, so tokens before the first that left are as ever; later ones differ.
    assert end[0, :5].equal(whole[0, :5])
    assert end[1, :3].equal(whole[1, :3])
    assert not torch.allclose(end[0, 7:], whole[0, 7:], rtol=1e-3)


def test_what_a_token_leaves_behind_is_what_is_served(tiny_dir: Path) -> None:
    """A token leaves after layer 2; the next one reads the keys and values that were filled in."""
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    model = Transformer(config, weights, (2,), 64)
    generator = torch.Generator().manual_seed(5)
    size = (config.num_layers - 2) * 2 * config.kv_size
    weight = torch.randn(size, config.hidden_size, generator=generator) / 8
    text = ids_of(config.vocab_size, 9)[0]
    with torch.no_grad():
        _, end, _ = leave(
            DenseModel(config, weights, 64), padded([text]), torch.tensor([7]), weight
        )

    def rows(first: int, last: int) -> HostRows:
        return HostRows([Span(range(first, last), range(1))], 32, model.rotary, model.device)

    cache = KVCache(config, 1, 32, torch.float32, model.device)
    low, high = model.segments
    with torch.inference_mode():
        high(low(model.embed(torch.tensor(text[:7])), rows(0, 7), cache), rows(0, 7), cache)
        at_exit = low(model.embed(torch.tensor(text[7:8])), rows(7, 8), cache)
        at, pages = rows(7, 8).table, cache.pages[2:]
        project_kv(
            at_exit, weight, None, None, pages, at.places, at.cos, at.sin, config.rms_norm_eps
        )
        last = high(low(model.embed(torch.tensor(text[8:])), rows(8, 9), cache), rows(8, 9), cache)
    torch.testing.assert_close(end[0, 8:], last, rtol=1e-4, atol=1e-4)


def test_rounded_weights_pass_their_gradient_to_the_delta(tiny_dir: Path) -> None:
    """The value is the rounded weight's, the gradient that of the sum it was rounded from."""
    config = config_from_hf(tiny_dir)
    weights = load_weights(tiny_dir, config, dtype=torch.float32)
    deltas = new_deltas(weights, config, fingerprint="f" * 32, rank=4, seed=1)
    name = "layers.3.down"
    down, up = deltas.low[name]
    up.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    rounded = weights[name] + up @ down
    ids = padded(ids_of(320, 9, 14))
    found = []
    for model in (
        DenseModel(config, weights, 64, {name: (down, up)}),
        DenseModel(config, weights, 64, {name: (down, up)}, {name: rounded}),
    ):
        for factor in (down, up):
            factor.grad = None
            factor.requires_grad_(True)
        last = model(ids).last
        last.square().sum().backward()
        assert down.grad is not None
        assert up.grad is not None
        found.append((last.detach(), down.grad.clone(), up.grad.clone()))
    for added, through in zip(*found, strict=True):
        torch.testing.assert_close(through, added, rtol=1e-3, atol=1e-3)
    coarse = {name: rounded.mul(4).round() / 4}
    with torch.no_grad():
        last = DenseModel(config, weights, 64, {name: (down, up)}, coarse)(ids).last
        plain = DenseModel(config, weights | coarse, 64)(ids).last
    assert last.equal(plain)


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
