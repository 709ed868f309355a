"""The doors of the C kernels: what would be read or written outside is refused before."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels.bounds import check_pages
from offramp.kernels.decoder import (
    LayerSizes,
    LayerWeights,
    NativeLayers,
    Taps,
    rows_matrix,
)
from offramp.kernels.draft import NativeDraft
from offramp.kernels.native import library
from offramp.kernels.rotary import RotaryTable
from offramp.kernels.rows import HostRows, Span
from offramp.kernels.weight_formats import NativeWeight, WeightFormat, pack
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import all_in
from offramp.models.transformer import Transformer
from tests.kernels.test_decoder import BLOCK, CPU, POSITIONS, config, weights
from tests.models.test_drafting import MIXED, drafter

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels on this machine")

BLOCKS = 8


@pytest.fixture(scope="module")
def model() -> Transformer:
    shape = config()
    recipes = all_in(WeightFormat.FP32)
    return Transformer(shape, weights(shape, WeightFormat.FP32), (), POSITIONS, recipes)


@pytest.fixture
def cache(model: Transformer) -> KVCache:
    return KVCache(model.config, BLOCKS, BLOCK, torch.float32, CPU)


def parts(model: Transformer) -> tuple[list[LayerWeights], LayerSizes]:
    return [layer.weights for layer in model.layers], model.layers[0].sizes


def table(model: Transformer, blocks: list[int] | None = None) -> HostRows:
    span = Span(range(5), [0, 1] if blocks is None else blocks)
    return HostRows([span], BLOCK, model.rotary, CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 2**31},
        {"window": -1},
        {"window": 0},
        {"heads": 0},
        {"heads": 5},
        {"kv_heads": 0},
        {"kv_heads": -2},
        {"head_dim": 2**31},
        {"head_dim": 2**20},
        {"width": 96},
        {"inner": 2**30},
        {"inner": 128},
        {"eps": float("nan")},
        {"eps": 0.0},
        {"eps": -1e-5},
        {"eps": 1e-60},
        {"eps": float("inf")},
    ],
)
def test_sizes_are_checked_where_layers_are_put_together(
    model: Transformer, changes: dict[str, Any]
) -> None:
    layers, sizes = parts(model)
    assert NativeLayers.of(layers, sizes) is not None
    with pytest.raises(ValueError, match=r"kernels take|not|share"):
        NativeLayers.of(layers, replace(sizes, **changes))


@pytest.mark.parametrize("name", ["attn_norm", "mlp_norm", "qkv", "o", "gate_up", "down"])
def test_weights_are_checked_where_layers_are_put_together(model: Transformer, name: str) -> None:
    layers, sizes = parts(model)
    other: dict[str, Any] = {
        "qkv": layers[0].o,
        "o": layers[0].qkv,
        "gate_up": layers[0].down,
        "down": layers[0].gate_up,
        "attn_norm": torch.ones(sizes.width - 1),
        "mlp_norm": torch.ones(2 * sizes.width)[::2],
    }
    with pytest.raises(ValueError, match=name):
        NativeLayers.of([replace(layers[0], **{name: other[name]})], sizes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hidden: hidden[:4],
        lambda hidden: hidden[:, :-1],
        lambda hidden: hidden.double(),
        lambda hidden: hidden.t().contiguous().t(),
    ],
)
def test_states_of_another_shape_are_refused(
    model: Transformer, cache: KVCache, spoil: Callable[[Tensor], Tensor]
) -> None:
    hidden = torch.randn(5, model.config.hidden_size)
    model.segments[0](hidden, table(model), cache)
    with pytest.raises(ValueError, match="kernels take"):
        model.segments[0](spoil(hidden), table(model), cache)


def test_blocks_and_positions_that_there_are_not_are_refused(
    model: Transformer, cache: KVCache
) -> None:
    hidden = torch.randn(5, model.config.hidden_size)
    with pytest.raises(IndexError, match="blocks"):
        model.segments[0](hidden, table(model, [0, BLOCKS]), cache)
    with pytest.raises(IndexError, match="negative"):
        table(model, [0, -1])
    with pytest.raises(IndexError, match="negative"):
        HostRows([Span(range(-1, 3), [0])], BLOCK, model.rotary, CPU)
    with pytest.raises(IndexError):
        HostRows([Span(range(5), [0])], BLOCK, model.rotary, CPU)
    short = RotaryTable(torch.tensor(model.config.inv_freq), 4, 1.0, torch.float32, CPU)
    with pytest.raises(IndexError):
        HostRows([Span(range(5), [0, 1])], BLOCK, short, CPU)


def test_pages_of_another_model_are_refused(model: Transformer, cache: KVCache) -> None:
    shape = model.config
    hidden, rows = torch.randn(5, shape.hidden_size), table(model)
    for other in (
        replace(shape, num_layers=shape.num_layers - 1),
        replace(shape, num_kv_heads=1),
        replace(shape, head_dim=16),
    ):
        with pytest.raises(ValueError, match="pages"):
            model.segments[0](hidden, rows, KVCache(other, BLOCKS, BLOCK, torch.float32, CPU))
    for pages in (KVCache(shape, BLOCKS, BLOCK, torch.float64, CPU), None):
        with pytest.raises(ValueError, match="pages"):
            check_pages(
                cache.pages[:, :1] if pages is None else pages.pages, 2, shape.num_kv_heads, 32
            )
    by_block = KVCache(shape, BLOCKS, BLOCK, torch.float32, CPU, by_block=True).pages
    check_pages(by_block, shape.num_layers - 1, shape.num_kv_heads, shape.head_dim)
    with pytest.raises(ValueError, match="no layer"):
        check_pages(by_block, shape.num_layers, shape.num_kv_heads, shape.head_dim)
    with pytest.raises(ValueError, match="blocks of 4 tokens"):
        model.segments[0](hidden, rows, KVCache(shape, BLOCKS, 2, torch.float32, CPU))


def test_states_are_kept_in_rows_that_there_are(model: Transformer, cache: KVCache) -> None:
    hidden, rows = torch.randn(5, model.config.hidden_size), table(model)
    states, slots = torch.zeros(6, 1, 64), torch.full((3,), -1, dtype=torch.int32)
    good = Taps(states, array("q", range(5)), slots)
    model.segments[0](hidden, rows, cache, good)
    for wrong in (
        replace(good, rows=array("q", range(2, 7))),
        replace(good, rows=array("q", range(-1, 4))),
        replace(good, slots=slots[:2]),
        replace(good, states=torch.zeros(6, 1, 63)),
    ):
        with pytest.raises((ValueError, IndexError)):
            model.segments[0](hidden, rows, cache, wrong)


@pytest.mark.parametrize("form", [WeightFormat.FP32, WeightFormat.FP16])
def test_rows_and_inputs_of_a_weight_are_checked(form: WeightFormat) -> None:
    weight = pack(torch.randn(7, 32), torch.randn(7), form)
    assert isinstance(weight, NativeWeight)
    for ids in ([7], [-1], [0, 2**40]):
        with pytest.raises(IndexError, match="rows of a weight"):
            weight.rows(torch.tensor(ids))
    for x in (torch.randn(2, 31), torch.randn(2, 64), torch.randn(2, 32).double()):
        with pytest.raises(ValueError, match="inputs"):
            weight(x)
    assert weight.rows(torch.tensor([], dtype=torch.long)).shape == (0, 32)
    for wrong in (torch.randn(6), torch.randn(7, 1)):
        with pytest.raises(ValueError, match="bias"):
            pack(torch.randn(7, 32), wrong, form)


def test_a_draft_is_checked(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = drafter(tmp_path_factory.mktemp("draft"), "tied", WeightFormat.FP32, native=True)
    native = made._native
    assert isinstance(native, NativeDraft)
    pages = made._cache.pages
    native(MIXED, 0.0, made.states, pages)
    span = MIXED[0]
    beyond = len(native._parts.angles[0])
    for wrong in (
        replace(span, token_ids=(*span.token_ids[:-1], 10**6)),
        replace(span, token_ids=(*span.token_ids[:-1], -1)),
        replace(span, rows=(*span.rows[:-1], len(made.states))),
        replace(span, rows=(*span.rows[:-1], -2)),
        replace(span, table=[10**6] * len(span.table)),
        replace(span, table=[-1] * len(span.table)),
        replace(
            span,
            positions=range(beyond, beyond + len(span.positions)),
            table=[0] * (beyond + 8),
        ),
    ):
        with pytest.raises(IndexError):
            native((wrong,), 0.0, made.states, pages)
    with pytest.raises(ValueError, match="as many"):
        native((replace(span, rows=span.rows[:-1]),), 0.0, made.states, pages)
    with pytest.raises(ValueError, match="states"):
        native(MIXED, 0.0, made.states[:, :1].contiguous(), pages)
    parts_of = native._parts
    for changes in (
        {"norm": torch.ones(3)},
        {"vocab": parts_of.vocab + 10**6},
        {"vocab": parts_of.vocab[:-1]},
        {"feedback": parts_of.fuse},
        {"fuse": parts_of.lm_head},
        {"angles": (parts_of.angles[0], parts_of.angles[1][1:])},
    ):
        with pytest.raises((ValueError, IndexError)):
            NativeDraft.of(made._layer.native, replace(parts_of, **changes))


def test_tokens_begin_as_rows_of_the_embeddings(model: Transformer, cache: KVCache) -> None:
    layers, rows = model.segments[0].native, table(model)
    embeddings = rows_matrix(model.embedding_weight)
    assert layers is not None
    assert embeddings is not None
    ids = [3, 0, 7, 7, 1]
    found = layers.from_tokens(ids, embeddings, rows, cache.pages)
    assert found.equal(layers(model.embed(torch.tensor(ids)), rows, cache.pages))
    for wrong in ([*ids[:4], embeddings.outs], [-1, *ids[1:]]):
        with pytest.raises(IndexError, match="tokens"):
            layers.from_tokens(wrong, embeddings, rows, cache.pages)
    with pytest.raises(ValueError, match="kernels take 5"):
        layers.from_tokens(ids[:4], embeddings, rows, cache.pages)
    other = rows_matrix(torch.randn(8, 32))
    assert other is not None
    with pytest.raises(ValueError, match="32 columns"):
        layers.from_tokens(ids, other, rows, cache.pages)


def test_only_rows_that_the_kernels_can_read_are_taken() -> None:
    good = torch.randn(4, 64)
    assert rows_matrix(good) is not None
    for wrong in (good.double(), good.t(), torch.randn(4, 48)):
        assert rows_matrix(wrong) is None
