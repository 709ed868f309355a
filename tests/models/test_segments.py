"""Our forward pass equals transformers', however the work is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.kernels.backend import INTERPRETED, rehearsal, triton
from offramp.kernels.rows import HostRows, Span
from offramp.models.loading.safetensors import load_weights
from offramp.models.transformer import Transformer

from .small import (
    EXITS,
    FAMILIES,
    LAYERS,
    POSITIONS,
    forward,
    make,
    new_cache,
    random_ids,
    their_logits,
)

TABLE = [7, 3, 4, 0, 12, 11, 20, 5, 6, 30]
OTHER_TABLES = [[1, 2], [8, 9, 10, 13, 14, 15], [16]]
LENGTH = 38


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=FAMILIES.keys())
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Transformer]:
    return make(FAMILIES[request.param], tmp_path_factory.mktemp("family"))


def test_logits_equal_transformers(pair: tuple[Any, Transformer]) -> None:
    theirs, ours = pair
    ids = random_ids(LENGTH)
    close(forward(ours, new_cache(ours), [(0, ids, TABLE)]), their_logits(theirs, ids))


@pytest.mark.parametrize("chunk", [1, 3, 4, 17, LENGTH])
def test_prefill_in_chunks_equals_one_go(pair: tuple[Any, Transformer], chunk: int) -> None:
    """Chunk 1 is decoding, token by token."""
    theirs, ours = pair
    ids = random_ids(LENGTH)
    cache = new_cache(ours)
    parts = [
        forward(ours, cache, [(start, ids[start : start + chunk], TABLE)])
        for start in range(0, LENGTH, chunk)
    ]
    close(torch.cat(parts), their_logits(theirs, ids))


def test_a_mixed_batch_equals_each_alone(pair: tuple[Any, Transformer]) -> None:
    """A late chunk, a decode row, a whole prompt and a single token share one pass."""
    theirs, ours = pair
    texts = [random_ids(n) for n in (LENGTH, 8, 21, 1)]
    starts = [30, 7, 0, 0]
    tables = [TABLE, *OTHER_TABLES]
    cache = new_cache(ours)
    for ids, start, table in zip(texts, starts, tables, strict=True):
        if start:
            forward(ours, cache, [(0, ids[:start], table)])
    mixed = forward(
        ours,
        cache,
        [
            (start, ids[start:], table)
            for ids, start, table in zip(texts, starts, tables, strict=True)
        ],
    )
    alone = [their_logits(theirs, ids)[s:] for ids, s in zip(texts, starts, strict=True)]
    close(mixed, torch.cat(alone))


@pytest.mark.skipif(not INTERPRETED or triton is None, reason="kernels are not interpreted")
def test_the_kernels_of_gpus_give_the_same(pair: tuple[Any, Transformer]) -> None:
    """Interpreted: a chunk behind what is in the cache beside another text's first tokens."""
    theirs, ours = pair
    first, second = random_ids(13), random_ids(3)
    cache = new_cache(ours)
    with rehearsal():
        forward(ours, cache, [(0, first[:10], TABLE)])
        mixed = forward(ours, cache, [(10, first[10:], TABLE), (0, second, OTHER_TABLES[0])])
    close(mixed, torch.cat((their_logits(theirs, first)[10:], their_logits(theirs, second))))


def test_segments_end_at_the_exit_layers(pair: tuple[Any, Transformer]) -> None:
    """Chained they are all layers, and each ends with the state transformers has there."""
    theirs, ours = pair
    ids = random_ids(LENGTH)
    cache = new_cache(ours)
    rows = HostRows([Span(range(LENGTH), TABLE)], cache.block_size, ours.rotary, ours.device)
    with torch.inference_mode():
        states = theirs.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        hidden = ours.embed(torch.tensor(ids))
        for segment, end in zip(ours.segments, (*EXITS, LAYERS), strict=True):
            hidden = segment(hidden, rows, cache)
            assert segment.first + len(segment) == end
            # The last of their states is already normalised.
            found = ours.normed(hidden) if end == LAYERS else hidden
            close(found, states.hidden_states[end][0])
    assert [layer.index for layer in ours.layers] == list(range(LAYERS))


def test_where_the_stack_is_cut_does_not_matter(
    pair: tuple[Any, Transformer], tmp_path: Path
) -> None:
    """The same weights without exit points give the same logits, bit for bit."""
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    weights = load_weights(tmp_path, ours.config, dtype=torch.float32)
    whole = Transformer(ours.config, weights, (), POSITIONS)
    ids = random_ids(LENGTH)
    chained = forward(ours, new_cache(ours), [(0, ids, TABLE)])
    assert len(whole.segments) == 1
    assert forward(whole, new_cache(whole), [(0, ids, TABLE)]).equal(chained)
