"""All ops that are measured, by name; those that others are checked with come first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from offramp.server.bench.kernels.attention import decode_attention_cases, prefill_attention_cases
from offramp.server.bench.kernels.case import Case
from offramp.server.bench.kernels.exits import fire_cases, leave_cases
from offramp.server.bench.kernels.keys_values import fill_kv_cases, rope_and_store_cases
from offramp.server.bench.kernels.pointwise import (
    add_rms_norm_cases,
    rms_norm_cases,
    swiglu_cases,
)
from offramp.server.bench.kernels.products import linear_cases, masked_linear_cases
from offramp.server.bench.kernels.setup import Setup
from offramp.server.bench.kernels.slots import arrive_cases, board_cases
from offramp.server.bench.kernels.vocabulary import (
    embed_rows_cases,
    sample_rows_cases,
    score_logits_cases,
)

Maker = Callable[[Setup, int, int], Iterator[Case]]
"""Makes an op's cases for so many rows, of which so many are there."""

OPS: Mapping[str, Maker] = MappingProxyType(
    {
        "rms_norm": rms_norm_cases,
        "add_rms_norm": add_rms_norm_cases,
        "swiglu": swiglu_cases,
        "linear": linear_cases,
        "masked_linear": masked_linear_cases,
        "rope_and_store": rope_and_store_cases,
        "decode_attention": decode_attention_cases,
        "prefill_attention": prefill_attention_cases,
        "fill_kv": fill_kv_cases,
        "embed_rows": embed_rows_cases,
        "board": board_cases,
        "fire": fire_cases,
        "leave": leave_cases,
        "arrive": arrive_cases,
        "score_logits": score_logits_cases,
        "sample_rows": sample_rows_cases,
    }
)
