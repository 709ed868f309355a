"""The draft head: the C kernels against the other kernels, and guesses that depend on nothing else.

Heads have random weights, so that guesses vary with everything they are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from offramp.kernels.draft import FARTHEST, Guesses
from offramp.kernels.native import library
from offramp.kernels.noise import TokenNoise
from offramp.kernels.weight_formats import WeightFormat
from offramp.models.drafting import Drafter
from offramp.models.exits.draft_head import (
    DraftFile,
    DraftFileError,
    DraftHead,
    load_draft_head,
    rounded,
)
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import Recipes
from offramp.models.step import DraftRows
from offramp.models.transformer import Transformer

from .small import BLOCK, CPU, SIZES, VOCAB, make

WIDTH, INNER, HEADS, KV_HEADS = 64, 96, 4, 2
ROWS, BLOCKS = 40, 30
READ = (2, 5, 6)
SHAPE = SIZES | {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
MODELS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "untied": LlamaConfig(**SHAPE),
    "biased": Qwen2Config(**SHAPE, tie_word_embeddings=True),
}
FORMS = [WeightFormat.FP32, WeightFormat.FP16, WeightFormat.INT4]
needs_kernels = pytest.mark.skipif(library() is None, reason="there is no C compiler")


def grid(*shape: int, form: WeightFormat) -> Tensor:
    """Random weights that ``form`` holds exactly."""
    weight = torch.randn(shape) / shape[-1] ** 0.5
    return rounded(weight) if form is WeightFormat.INT4 else weight.half().float()


def new_head(layers: Sequence[int], form: WeightFormat) -> DraftHead:
    queries, kv = WIDTH, WIDTH * KV_HEADS // HEADS
    return DraftHead(
        layers=tuple(layers),
        fuse=grid(WIDTH, (1 + len(layers)) * WIDTH, form=form),
        feedback=grid(WIDTH, 2 * WIDTH, form=form),
        attn_norm=1 + torch.randn(WIDTH) / 8,
        qkv=grid(queries + 2 * kv, WIDTH, form=form),
        o=grid(WIDTH, queries, form=form),
        mlp_norm=1 + torch.randn(WIDTH) / 8,
        gate_up=grid(2 * INNER, WIDTH, form=form),
        down=grid(WIDTH, INNER, form=form),
        norm=1 + torch.randn(WIDTH) / 8,
        vocab=torch.arange(1, VOCAB, 2),
    )


def drafter(
    folder: Path, kind: str, form: WeightFormat, *, native: bool, layers: Sequence[int] = READ
) -> Drafter:
    """A drafter with the states of all rows in place; the same for ``native`` and not."""
    plain = (WeightFormat.FP32 if native else WeightFormat.PLAIN,)
    # Its rows are in 4 bits whatever the model's are.
    recipes = Recipes(plain, plain, plain, (WeightFormat.INT4, form) if native else plain)
    _, model = make(MODELS[kind], folder, recipes)
    torch.manual_seed(5)
    head = new_head(layers, form)
    cache = KVCache(model.config, BLOCKS, BLOCK, torch.float32, CPU, 1)
    for pair in cache.layers:
        for pages in pair:
            pages.fill_(float("nan"))
    made = Drafter(model, head, cache, ROWS)
    assert (made._native is not None) is native
    made.states[:-1] = 3 * torch.randn(made.states[:-1].shape)
    return made


def work_of(*sequences: tuple[int, int, int]) -> tuple[DraftRows, ...]:
    """Sequences of so many entries, their first block with entries, and guesses."""
    generator = torch.Generator().manual_seed(1)
    work, row, block = [], 0, 0
    for count, first_block, guesses in sequences:
        begin = first_block * BLOCK
        ids = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
        size = -(-(begin + count + guesses) // BLOCK)
        # Not in order, as blocks are that were free here and there.
        table = list(range(block, block + size))[::-1]
        rows = [-1 if index == 0 else row + index for index in range(count)]
        work.append(
            DraftRows(
                range(begin, begin + count), tuple(ids), tuple(rows), table, first_block, guesses
            )
        )
        row, block = row + count, block + size
    return tuple(work)


MIXED = work_of((7, 0, 3), (1, 2, 1), (9, 1, 0), (2, 0, 4), (4, 3, 4))


@torch.inference_mode()
def run(made: Drafter, work: Sequence[DraftRows], bound: float = 0.0) -> Guesses:
    return made.run(work, bound)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_close(one: Guesses, other: Guesses) -> bool:
    mine, theirs = (torch.tensor(list(chain(*each.chances))) for each in (one, other))
    return one.tokens == other.tokens and torch.allclose(mine, theirs, atol=2e-3)


RANDOM = tuple(
    replace(item, noise=TokenNoise(temperature, seed, 5 + seed) if temperature else None)
    for seed, (item, temperature) in enumerate(zip(MIXED, (0.8, 0, 2.0, 1e-40, 1.0), strict=True))
)


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernels_agree_with_the_reference_on_random_guesses(
    tmp_path: Path, form: WeightFormat, threads: int
) -> None:
    one = drafter(tmp_path / "a", "tied", form, native=True)
    other = drafter(tmp_path / "b", "tied", form, native=False)
    with on_threads(threads):
        found, expected, plain = run(one, RANDOM), run(other, RANDOM), run(one, MIXED)
    assert is_close(found, expected)
    differ = [own != other for own, other in zip(found.tokens, plain.tokens, strict=True)]
    # Without noise, and with next to none, nothing changes.
    assert differ == [True, False, False, False, True]


@needs_kernels
def test_guesses_are_those_of_the_largest_logit_with_noise(tmp_path: Path) -> None:
    """Far more often than its share, one who knows the logits nearly and the noise is right."""
    made = drafter(tmp_path, "tied", WeightFormat.FP32, native=True)
    logits: list[Tensor] = []
    reference = drafter(tmp_path / "b", "tied", WeightFormat.FP32, native=False)
    head = reference._lm_head

    def keep(states: Tensor) -> Tensor:
        logits.append(head(states))
        return logits[-1].clone()

    with patch.object(reference, "_lm_head", side_effect=keep):
        run(reference, [replace(MIXED[0], guesses=1)])
    for index in range(30):
        noise = TokenNoise(0.9, 77, index)
        found = run(made, [replace(MIXED[0], guesses=1, noise=noise)])
        keys = noise.keys(logits[0][0], made._vocab)
        assert found.tokens[0] == (int(made._vocab[keys.argmax()]),)
        near = keys[keys > keys.max() - FARTHEST]
        assert found.chances[0][0] == pytest.approx(float(near.softmax(0).max()), abs=1e-3)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
def test_a_sequence_with_little_luck_stops_sooner(
    tmp_path: Path,
    native: bool,  # noqa: FBT001
) -> None:
    made = drafter(tmp_path, "tied", WeightFormat.FP32, native=native)
    item = replace(MIXED[3], guesses=4)
    chances = torch.tensor(run(made, [item]).chances[0])
    bound = float(chances[:3].prod()) * 0.9
    lengths = []
    for luck in (1.0, 0.9, 0.1):
        found = run(made, [replace(item, luck=luck)], bound)
        products = chances.cumprod(0) * luck ** torch.arange(1, 5)
        likely = int((products >= bound).cumprod(0).sum())
        lengths.append(len(found.tokens[0]))
        assert lengths[-1] == min(4, likely + 1)
    assert lengths[0] == 4
    assert lengths[-1] < lengths[0]


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernels_agree_with_the_reference(
    tmp_path: Path, kind: str, form: WeightFormat, threads: int
) -> None:
    one = drafter(tmp_path / "a", kind, form, native=True)
    other = drafter(tmp_path / "b", kind, form, native=False)
    with on_threads(threads):
        found, expected = run(one, MIXED), run(other, MIXED)
    assert is_close(found, expected)
    assert [len(own) for own in found.tokens] == [3, 1, 0, 4, 4]
    for mine, theirs in zip(one._cache.layers[-1], other._cache.layers[-1], strict=True):
        assert torch.allclose(mine, theirs, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
def test_no_sequence_notices_the_others(tmp_path: Path, native: bool) -> None:  # noqa: FBT001
    together = drafter(tmp_path / "a", "tied", WeightFormat.FP32, native=native)
    alone = drafter(tmp_path / "b", "tied", WeightFormat.FP32, native=native)
    found = run(together, MIXED)
    for index, item in enumerate(MIXED):
        own = run(alone, [item])
        assert own.tokens[0] == found.tokens[index]
        assert own.chances[0] == pytest.approx(found.chances[index], abs=1e-5)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
def test_entries_may_be_made_a_few_at_a_time(tmp_path: Path, native: bool) -> None:  # noqa: FBT001
    """As prompts come in chunks, and the rest token by token."""
    whole = drafter(tmp_path / "a", "tied", WeightFormat.FP32, native=native)
    parts = drafter(tmp_path / "b", "tied", WeightFormat.FP32, native=native)
    item = MIXED[0]
    expected = run(whole, [item])
    for begin, end in ((0, 4), (4, 5), (5, 7)):
        part = replace(
            item,
            positions=item.positions[begin:end],
            token_ids=item.token_ids[begin:end],
            rows=item.rows[begin:end],
            guesses=item.guesses if end == 7 else 0,
        )
        found = run(parts, [part])
    assert is_close(found, expected)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
def test_a_sequence_stops_where_its_guesses_are_unlikely(
    tmp_path: Path,
    native: bool,  # noqa: FBT001
) -> None:
    made = drafter(tmp_path, "tied", WeightFormat.FP32, native=native)
    all_of_them = run(made, MIXED)
    products = [torch.tensor(own).cumprod(0).tolist() for own in all_of_them.chances]
    bound = sorted(chain(*products))[-4] * 1.001
    found = run(made, MIXED, bound)
    for tokens, wanted, own in zip(found.tokens, all_of_them.tokens, products, strict=True):
        # The first guess below the bound is made, none behind it.
        likely = sum(product >= bound for product in own)
        assert tokens == wanted[: likely + 1]
    assert sum(map(len, found.tokens)) < sum(map(len, all_of_them.tokens))


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
def test_guesses_leave_entries_that_true_ones_replace(
    tmp_path: Path,
    native: bool,  # noqa: FBT001
) -> None:
    made = drafter(tmp_path / "a", "tied", WeightFormat.FP32, native=native)
    fresh = drafter(tmp_path / "b", "tied", WeightFormat.FP32, native=native)
    item = MIXED[0]
    run(made, [item])
    more = replace(
        item, positions=range(7, 9), token_ids=(11, 12), rows=(20, 21), guesses=1, table=item.table
    )
    run(fresh, [replace(item, guesses=0)])
    assert is_close(run(made, [more]), run(fresh, [more]))


def test_states_are_kept_on_the_way_up(tmp_path: Path) -> None:
    """Of every row after every layer the head reads, whichever kernels run."""
    from offramp.kernels.rows import HostRows, Span  # noqa: PLC0415

    for native in (False, True) if library() is not None else (False,):
        made = drafter(tmp_path / str(native), "tied", WeightFormat.FP32, native=native)
        model: Transformer = made._model
        rows = HostRows([Span(range(3), [0])], BLOCK, model.rotary, CPU)
        with torch.inference_mode():
            hidden = model.embed(torch.tensor([4, 5, 6]))
            taps = made.taps([8, 3, 5])
            seen = {}
            for segment in model.segments:
                hidden = segment(hidden, rows, made._cache, taps)
                seen[segment.first + len(segment)] = hidden
        assert torch.equal(made.states[[8, 3, 5], 0], seen[2])
        assert torch.equal(made.states[[8, 3, 5], 2], seen[6])
        assert not made.states[-1].any()


def file_of(head: DraftHead, name: str = "model") -> DraftFile:
    return DraftFile(name, head, ((0.1, 0.5),) * 10, {"acceptance": [0.5]}, {"answers": 3})


def test_a_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    torch.manual_seed(1)
    _, model = make(MODELS["tied"], tmp_path)
    head = new_head(READ, WeightFormat.INT4)
    path = tmp_path / "a.draft.safetensors"
    file_of(head).save(path)
    found = load_draft_head(path, fingerprint="model", config=model.config)
    assert found.metrics == {"acceptance": [0.5]}
    assert found.chances == ((0.1, 0.5),) * 10
    assert found.head.layers == READ
    for name, tensor in head.parameters.items():
        assert torch.allclose(found.head.parameters[name], tensor, atol=1e-3), name
    assert torch.equal(found.head.vocab, head.vocab)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (2, 5)}, "the last included"),
        ({"layers": (5, 2, 6)}, "the last included"),
        ({"fuse": torch.zeros(WIDTH, 2 * WIDTH)}, "fuse has the shape"),
        ({"norm": torch.zeros(WIDTH + 1)}, "norm has the shape"),
        ({"norm": torch.full((WIDTH,), torch.nan)}, "not numbers"),
        ({"vocab": torch.tensor([1, VOCAB])}, f"token {VOCAB}"),
        ({"vocab": torch.tensor([3, 1])}, "ascending"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    _, model = make(MODELS["tied"], tmp_path)
    path = tmp_path / "a.draft.safetensors"
    head = replace(new_head(READ, WeightFormat.INT4), **change)  # type: ignore[arg-type]
    file_of(head).save(path)
    with pytest.raises(DraftFileError, match=message):
        load_draft_head(path, fingerprint="model", config=model.config)


def test_files_of_other_kinds_and_models_are_refused(tmp_path: Path) -> None:
    _, model = make(MODELS["tied"], tmp_path)
    path = tmp_path / "a.draft.safetensors"
    file_of(new_head(READ, WeightFormat.INT4), "another").save(path)
    with pytest.raises(DraftFileError, match="another model"):
        load_draft_head(path, fingerprint="model", config=model.config)
    with pytest.raises(DraftFileError, match="format"):
        load_draft_head(tmp_path / "model.safetensors", fingerprint="model", config=model.config)
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(DraftFileError, match="cannot be read"):
        load_draft_head(path, fingerprint="model", config=model.config)
