"""Debts: paid by recompute they never were, paid by projection or copy the error is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from offramp.kernels.rms_norm import rms_norm
from offramp.kernels.rows import flat_places
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import KVCache
from offramp.models.loading.safetensors import load_weights
from offramp.models.runner import Runner
from offramp.models.sampling_params import KVFill
from offramp.models.step import FillKV, OwedRows
from offramp.models.transformer import Transformer

from .passes import FULL, Pass, new_runner
from .small import EXITS, FAMILIES, LAYERS, make, random_ids

TABLE = [5, 1, 2, 9, 0, 7]
KV = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", params=["llama-biased-tied", "mistral-window", "qwen3-wide-heads"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return make(FAMILIES[request.param], tmp_path_factory.mktemp("fill"))[1]


def kv_at(cache: KVCache, layer: int, positions: range) -> KV:
    """K and V of some positions in one layer."""
    places = torch.tensor(flat_places(TABLE, positions, cache.block_size))
    k, v = (pages[places] for pages in cache.layers[layer])
    return k, v


def never_skipped(model: Transformer, ids: list[int]) -> Pass:
    """The whole text at full depth in one go."""
    ride = Pass(new_runner(model), ids, TABLE)
    ride.leave_after(FULL, len(ids))
    return ride


@settings(max_examples=25, deadline=None)
@given(exits=st.lists(st.integers(0, FULL), min_size=1, max_size=16), prompt=st.integers(1, 6))
def test_recompute_at_any_later_time_equals_never_skipped(
    model: Transformer, exits: list[int], prompt: int
) -> None:
    """Each token leaves where it likes; who goes deeper first pays what is owed there."""
    ids = torch.randint(3, 90, (prompt + len(exits) + 1,)).tolist()
    ride = Pass(new_runner(model), ids, TABLE)
    ride.leave_after(FULL, prompt)
    for end, segment in enumerate([*exits, FULL], start=prompt + 1):
        ride.leave_after(segment, end)
    exact = never_skipped(model, ids)
    for layer in range(LAYERS):
        pairs = zip(
            kv_at(ride.runner.cache, layer, range(len(ids))),
            kv_at(exact.runner.cache, layer, range(len(ids))),
            strict=True,
        )
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ride.runner.hidden[: len(ids)], exact.runner.hidden[: len(ids)], rtol=1e-4, atol=1e-4
    )


def owing(model: Transformer) -> Pass:
    """Positions 0 .. 6 at full depth, 6 left after segment 1, then 7 and 8 after segment 0."""
    ride = Pass(new_runner(model), random_ids(9), TABLE)
    ride.leave_after(FULL, 6)
    ride.leave_after(1, 7)
    ride.leave_after(0, 9)
    return ride


def debts_of(ride: Pass) -> tuple[OwedRows, ...]:
    return (OwedRows(2, (6,), (6,), ride.table), OwedRows(1, (7, 8), (7, 8), ride.table))


def by_hand(model: Transformer, layer: int, state: Tensor, position: int) -> KV:
    """K and V of a layer whose input is ``state`` [d], with rotary angles written out."""
    config, weights = model.config, model.layers[layer]
    normed = rms_norm(state, weights.attn_norm, config.rms_norm_eps)
    kv = weights.qkv.weight[config.query_size :] @ normed
    if weights.qkv.bias is not None:
        kv = kv + weights.qkv.bias[config.query_size :]
    k, v = kv.view(2, config.num_kv_heads, config.head_dim)
    if weights.k_norm is not None:
        k = rms_norm(k, weights.k_norm, config.rms_norm_eps)
    rotated = torch.zeros_like(k)
    half = config.head_dim // 2
    for index, frequency in enumerate(config.inv_freq):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        rotated[:, index] = k[:, index] * cos - k[:, index + half] * sin
        rotated[:, index + half] = k[:, index + half] * cos + k[:, index] * sin
    return rotated, v


def filled(ride: Pass, method: KVFill, expected: Callable[[int, int, int], KV]) -> None:
    """Fill all debts; compare each skipped layer, and see that nothing else moved.

    ``expected`` maps a layer, a position and the first skipped layer to K and V.
    """
    cache = ride.runner.cache
    before = [(k.clone(), v.clone()) for k, v in cache.layers]
    ride.runner.run(FillKV(method, debts_of(ride)))
    for layer in range(LAYERS):
        changed = []
        for position, first in ((6, EXITS[1]), (7, EXITS[0]), (8, EXITS[0])):
            if layer >= first:
                changed.append(position)
                found = kv_at(cache, layer, range(position, position + 1))
                for got, want in zip(found, expected(layer, position, first), strict=True):
                    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)
        others = torch.ones(cache.num_blocks * cache.block_size, dtype=torch.bool)
        others[flat_places(TABLE, changed, cache.block_size)] = False
        for pages, old in zip(cache.layers[layer], before[layer], strict=True):
            flat, was = pages[others], old[others]
            assert flat.nan_to_num(0.5).equal(was.nan_to_num(0.5))


def test_projection_equals_each_layer_by_hand(model: Transformer) -> None:
    ride = owing(model)
    states = ride.runner.hidden.clone()
    filled(
        ride,
        KVFill.PROJECT,
        lambda layer, position, _: by_hand(model, layer, states[position], position),
    )


def test_copy_repeats_the_last_computed_layer(model: Transformer) -> None:
    ride = owing(model)
    cache = ride.runner.cache

    def last(_: int, position: int, first: int) -> KV:
        k, v = kv_at(cache, first - 1, range(position, position + 1))
        return k[0].clone(), v[0].clone()

    filled(ride, KVFill.COPY, last)


def test_projection_is_exact_in_the_first_skipped_layer(model: Transformer) -> None:
    """Its input is the exit state itself; only the layers above are guessed."""
    ride = owing(model)
    exact = never_skipped(model, list(ride.ids))
    ride.runner.run(FillKV(KVFill.PROJECT, debts_of(ride)[1:]))
    for found, expected in zip(
        kv_at(ride.runner.cache, EXITS[0], range(7, 9)),
        kv_at(exact.runner.cache, EXITS[0], range(7, 9)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.weights
def test_drift_of_projection_on_real_weights(
    smollm2_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    """Projected K,V are nearer to the exact ones than copied ones, exact in the first layer."""
    config = config_from_hf(smollm2_dir)
    weights = load_weights(smollm2_dir, config, dtype=torch.float32)
    real = Transformer(config, weights, (22, 26), 64)
    text = "The lighthouse keeper counted the ships that passed before the storm came in."
    ids = AutoTokenizer.from_pretrained(smollm2_dir)(text).input_ids[: 4 * len(TABLE)]
    owed = range(4, len(ids))
    exact = never_skipped(real, ids)
    for first, segment in ((22, 1), (26, 2)):
        errors = {
            method: _errors(real, ids, owed, method, exact.runner, segment)
            for method in (KVFill.PROJECT, KVFill.COPY)
        }
        for layer in range(first, config.num_layers):
            for method, found in errors.items():
                for name, error in zip("kv", found[layer - first], strict=True):
                    record_property(f"exit {first} {method} layer {layer} {name}", round(error, 4))
        project, copy = ([sum(pair) for pair in errors[method]] for method in errors)
        assert project[0] < 1e-3
        # V drifts most: in the last layer more than if it were missing (1.33 at the writing).
        assert max(k for k, _ in errors[KVFill.PROJECT]) < 1.0
        assert max(v for _, v in errors[KVFill.PROJECT]) < 1.5
        assert sum(project) < sum(copy)


def _errors(
    model: Transformer, ids: list[int], owed: range, method: KVFill, exact: Runner, segment: int
) -> list[tuple[float, float]]:
    """Relative errors of K and V in every layer from ``segment`` up."""
    ride = Pass(new_runner(model), ids, TABLE)
    ride.leave_after(segment - 1, len(ids))
    debt = OwedRows(segment, owed, tuple(owed), TABLE)
    ride.runner.run(FillKV(method, (debt,)))
    errors = []
    for layer in range(model.segments[segment].first, model.config.num_layers):
        pairs = zip(
            kv_at(ride.runner.cache, layer, owed), kv_at(exact.cache, layer, owed), strict=True
        )
        k, v = (float((a - b).norm() / b.norm()) for a, b in pairs)
        errors.append((k, v))
    return errors
