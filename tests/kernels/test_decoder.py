"""Decoder layers in one call against the composition of the other kernels, for every family."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from offramp.kernels.kv_formats import page_parts, write_kv
from offramp.kernels.native import library
from offramp.kernels.rows import HostRows, Span
from offramp.kernels.weight_formats import WeightFormat
from offramp.models.config import ModelConfig
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import Recipes
from offramp.models.transformer import Transformer
from tests.kernels.conftest import plain_kv
from tests.kernels.test_weight_formats import MAKE

pytestmark = pytest.mark.skipif(library() is None, reason="no C kernels on this machine")

CPU = torch.device("cpu")
BLOCK = 4
POSITIONS = 1200
SIZES = {
    "plain": {},
    "biased": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "normed heads": {"qk_norm": True},
    "window": {"sliding_window": 9},
    "one head each": {"num_heads": 4, "num_kv_heads": 4},
    "five share a head": {"num_heads": 5, "num_kv_heads": 1, "hidden_size": 96},
    "wide heads": {"head_dim": 48, "num_heads": 4, "num_kv_heads": 2},
}


def config(**changes: object) -> ModelConfig:
    plain: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": POSITIONS,
    }
    sizes = {**plain, **changes}
    half = int(str(sizes["head_dim"])) // 2
    angles = tuple(1 / 100 ** (i / half) for i in range(half))
    return ModelConfig(**sizes, inv_freq=angles)  # type: ignore[arg-type]


def halves(*size: int) -> Tensor:
    return (torch.randn(*size) / 5).half().float()


def weights(shape: ModelConfig, form: WeightFormat) -> dict[str, Tensor]:
    grid = MAKE.get(form)

    def make(*size: int) -> Tensor:
        # Quartered, quantised weights stay on their grid; as they come, they saturate attention.
        return halves(*size) if grid is None else grid(*size) / 4

    width, inner, query = shape.hidden_size, shape.intermediate_size, shape.query_size
    found = {"embed": torch.randn(shape.vocab_size, width), "final_norm": torch.ones(width)}
    for index in range(shape.num_layers):
        own = {
            "attn_norm": 1 + torch.randn(width) / 5,
            "mlp_norm": 1 + torch.randn(width) / 5,
            "qkv": make(query + 2 * shape.kv_size, width),
            "o": make(width, query),
            "gate_up": make(2 * inner, width),
            "down": make(width, inner),
        }
        if shape.attention_bias:
            own["qkv_bias"] = torch.randn(query + 2 * shape.kv_size)
            own["o_bias"] = torch.randn(width)
            own["gate_up_bias"] = torch.randn(2 * inner)
            own["down_bias"] = torch.randn(width)
        if shape.qk_norm:
            own["q_norm"] = 1 + torch.randn(shape.head_dim) / 5
            own["k_norm"] = 1 + torch.randn(shape.head_dim) / 5
        found |= {f"layers.{index}.{name}": tensor for name, tensor in own.items()}
    return found


def build(shape: ModelConfig, found: dict[str, Tensor], form: WeightFormat) -> Transformer:
    recipes = Recipes((form,), (WeightFormat.PLAIN,), (form,), (form,))
    return Transformer(shape, found, (1,), POSITIONS, recipes)


def cache_of(
    shape: ModelConfig,
    blocks: int = 200,
    dtype: torch.dtype = torch.float32,
    *,
    by_block: bool = False,
) -> KVCache:
    cache = KVCache(shape, blocks, BLOCK, dtype, CPU, by_block=by_block)
    for part in page_parts(cache.pages):
        part.fill_(float("nan") if part.is_floating_point() else 1)
    return cache


def table(first: int, positions: int) -> list[int]:
    """Blocks in an order that no two neighbours are adjacent."""
    count = -(-positions // BLOCK)
    return (
        [first + index * 7 % count for index in range(count)]
        if count % 7
        else [first + count - 1 - index for index in range(count)]
    )


@torch.inference_mode()
def run(model: Transformer, cache: KVCache, spans: Sequence[Span], hidden: Tensor) -> Tensor:
    rows = HostRows(spans, cache.block_size, model.rotary, model.device)
    for segment in model.segments:
        hidden = segment(hidden, rows, cache)
    return hidden


@pytest.mark.parametrize(
    "form", [WeightFormat.FP32, WeightFormat.FP16, WeightFormat.INT8, WeightFormat.INT4]
)
@pytest.mark.parametrize("changes", SIZES.values(), ids=list(SIZES))
def test_one_call_does_what_the_operators_do(
    changes: dict[str, object], form: WeightFormat
) -> None:
    """Two prompts of different lengths, then a chunk of one beside a single token of the other."""
    shape = config(**changes)
    found = weights(shape, form)
    models = [build(shape, found, form), build(shape, found, WeightFormat.PLAIN)]
    assert all(segment.is_native for segment in models[0].segments)
    assert all(not segment.is_native for segment in models[1].segments)
    caches = [cache_of(shape, by_block=True), cache_of(shape)]
    first, second = table(0, 90), table(50, 40)
    steps = [
        [Span(range(23), first), Span(range(7), second)],
        [Span(range(23, 61), first), Span(range(7, 8), second)],
        [Span(range(61, 62), first), Span(range(8, 9), second)],
    ]
    for spans in steps:
        hidden = torch.randn(sum(len(span.positions) for span in spans), shape.hidden_size)
        got, expected = (
            run(model, cache, spans, hidden) for model, cache in zip(models, caches, strict=True)
        )
        # Products of a matrix unit or of 16-bit inputs are a little off, more with each layer.
        bound = 1e-5 if form is WeightFormat.FP32 else 1e-3
        torch.testing.assert_close(got, expected, rtol=0, atol=bound * float(expected.abs().max()))
    bound = 0.1 if form in {WeightFormat.INT8, WeightFormat.INT4} else 0.03
    torch.testing.assert_close(caches[0].pages, caches[1].pages, rtol=0, atol=bound, equal_nan=True)


@pytest.mark.parametrize("pages", [torch.float32, torch.int16])
@pytest.mark.parametrize("window", [None, 600])
def test_long_contexts_are_shared_or_not_with_the_same_result(
    window: int | None, pages: torch.dtype
) -> None:
    """Splits of 512 keys: by one thread in a long prompt, by several for few rows."""
    shape = config(sliding_window=window)
    found = weights(shape, WeightFormat.FP32)
    model = build(shape, found, WeightFormat.FP32)
    plain = build(shape, found, WeightFormat.PLAIN)
    length, own = 1100, table(0, 1100)
    hidden = torch.randn(length, shape.hidden_size)
    expected = run(plain, cache_of(shape, 300), [Span(range(length), own)], hidden)
    whole = run(model, cache_of(shape, 300, pages), [Span(range(length), own)], hidden)
    bound = 1e-5 if pages is torch.float32 else 5e-4
    torch.testing.assert_close(whole, expected, rtol=0, atol=bound * float(expected.abs().max()))
    cache = cache_of(shape, 310, pages, by_block=True)
    other = Span(range(3), table(300, 3))
    ends = (500, 510, 513, 514, 515, 528, 1020, 1030, 1045, 1046, 1100)
    threads = torch.get_num_threads()
    try:
        for index, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
            torch.set_num_threads((1, 2, 5, 17)[index % 4])
            mixed = torch.cat((torch.randn(3, shape.hidden_size), hidden[begin:end]))
            part = run(model, cache, [other, Span(range(begin, end), own)], mixed)[3:]
            assert part.equal(whole[begin:end])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("pages", [torch.float32, torch.float16, torch.int16])
@pytest.mark.parametrize("form", [WeightFormat.FP32, WeightFormat.INT8, WeightFormat.INT4])
@pytest.mark.parametrize(
    "changes",
    [{}, {"head_dim": 64}, SIZES["wide heads"], SIZES["five share a head"]],
    ids=["plain", "heads of 64", "heads of 48", "five share a head"],
)
def test_results_do_not_depend_on_company_chunks_or_threads(
    changes: dict[str, object], form: WeightFormat, pages: torch.dtype
) -> None:
    """Bit for bit: a chunk of a prompt, a token alone and one among many are the same."""
    shape = config(**changes)
    model = build(shape, weights(shape, form), form)
    hidden = torch.randn(70, shape.hidden_size)
    own = table(0, 70)
    whole = run(model, cache_of(shape, dtype=pages), [Span(range(70), own)], hidden)
    cache = cache_of(shape, dtype=pages, by_block=True)
    other = Span(range(9), table(100, 9))
    threads = torch.get_num_threads()
    try:
        for threads_now, (begin, end) in zip(
            (1, 2, 17, 3), ((0, 33), (33, 34), (34, 40), (40, 70)), strict=True
        ):
            torch.set_num_threads(threads_now)
            mixed = torch.cat((torch.randn(9, shape.hidden_size), hidden[begin:end]))
            part = run(model, cache, [other, Span(range(begin, end), own)], mixed)[9:]
            assert part.equal(whole[begin:end])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-3), (torch.int16, 5e-4)], ids=str)
@pytest.mark.parametrize("changes", SIZES.values(), ids=list(SIZES))
def test_keys_and_values_in_half_the_memory(
    changes: dict[str, object], dtype: torch.dtype, bound: float
) -> None:
    """Pages hold the rounded numbers, and attention reads them as such."""
    shape = config(**changes)
    model = build(shape, weights(shape, WeightFormat.FP32), WeightFormat.FP32)
    hidden = torch.randn(45, shape.hidden_size)
    spans = [Span(range(38), table(0, 38)), Span(range(7), table(50, 7))]
    whole, half = cache_of(shape), cache_of(shape, dtype=dtype)
    expected, got = run(model, whole, spans, hidden), run(model, half, spans, hidden)
    torch.testing.assert_close(got, expected, rtol=0, atol=bound * float(expected.abs().max()))
    assert not got.equal(expected)
    # The first layer's inputs are the same in both.
    written = whole.pages[0].isfinite().all(-1)
    kept, exact = plain_kv(half.pages[0])[written], whole.pages[0][written]
    if dtype is torch.float16:
        assert kept.equal(exact.half().float())
    else:
        step = exact.abs().amax(-1, keepdim=True) / 32767
        assert bool(((kept - exact).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("scale", [0.0, 1e-35, 3e37])
def test_keys_and_values_of_any_size_become_integers(scale: float) -> None:
    """Next to nothing becomes nothing; large numbers do not overflow."""
    shape = config()
    cache = cache_of(shape, dtype=torch.int16)
    kv = torch.randn(1, shape.num_layers, 2, shape.num_kv_heads, shape.head_dim) * scale
    write_kv(kv, cache.pages, torch.tensor([BLOCK + 1]))
    kept = plain_kv(cache.pages)[:, :, 1, 1]
    torch.testing.assert_close(kept, kv[0], rtol=0, atol=max(1e-30, scale * 2e-4))


def test_the_input_is_left_as_it_was() -> None:
    shape = config()
    model = build(shape, weights(shape, WeightFormat.FP32), WeightFormat.FP32)
    hidden = torch.randn(3, shape.hidden_size)
    before = hidden.clone()
    run(model, cache_of(shape), [Span(range(3), [0])], hidden)
    assert hidden.equal(before)


def test_sizes_the_kernels_cannot_take_are_left_to_the_operators() -> None:
    shape = config(head_dim=24)
    model = build(shape, weights(shape, WeightFormat.PLAIN), WeightFormat.PLAIN)
    assert all(not segment.is_native for segment in model.segments)
    shape = config(num_heads=4, num_kv_heads=2, head_dim=24, hidden_size=96)
    model = build(shape, weights(shape, WeightFormat.FP32), WeightFormat.FP32)
    assert all(not segment.is_native for segment in model.segments)
