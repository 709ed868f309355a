"""One op as a case: its inputs on the device, its least cost, its check and its figures.

All inputs have a model's sizes and hold the same numbers every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from offramp.kernels.rotary import RotaryTable
from offramp.kernels.rows import RowTable, Span
from offramp.models.config import ModelConfig
from offramp.server.bench.common import Refused, columns
from offramp.server.bench.device import Ceilings, Clock, Launch, Timing, synchronise

BLOCK = 32
"""Tokens of a K,V block, the server's own default."""
LONG, SHORT = 8, 4
"""Bytes of an int64, and of an int32 or fp32."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Allowed error, as a share of a result plus the root mean square of the op's results."""
CASE_COLUMNS = columns(
    "op {op} | of {what} | rows {rows} | us {us:.2f} | least {us_least:.2f} | "
    "empty us {empty_us:.2f} | MB {megabytes:.3f} | GFLOP {gigaflops:.3f} | GB/s {gb_per_s:.1f} | "
    "TFLOP/s {tflop_per_s:.3f} | ceiling {ceiling} | share {share:.3f}"
)

_SEED = 7
# Tokens of a text at most in checks: enough for a context that attention cuts into parts.
_CONTEXT = 640


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot do without: bytes ``read`` and ``written``, each once, and ``flops``.

    An op that reads something twice, or keeps partial results, gets no allowance for that.
    """

    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        """Bytes that go through memory."""
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Case:
    """One op; ``what`` describes its sizes, ``rows`` is the number of rows it works on.

    ``launches`` are the same call on copies of what it reads in bulk, ``cold`` bytes in all, so
    that in a long sequence of launches none finds its input in a cache; 0 where a model, too, would
    find it there. ``reference`` is the first launch in plain operators, ``results`` gives what
    either wrote, as exact as ``rounding`` allows (None: the model's dtype). ``empty`` sets the
    count of active rows to 0 from now on (None: the op has no count on the device).
    """

    op: str
    what: str
    rows: int
    work: Work
    launches: Sequence[Launch]
    reference: Launch
    results: Callable[[], Mapping[str, Tensor]]
    cold: int = 0
    empty: Launch | None = None
    rounding: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What inputs are made for: the model's sizes, ``context`` tokens a text, dtype and device."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    context: int


@dataclass(frozen=True, slots=True)
class Copies:
    """How many copies of inputs there are: until they come to ``bytes``, at most ``most``."""

    bytes: int = 0
    most: int = 1

    def of(self, size: int) -> int:
        """Copies of ``size`` bytes."""
        return max(1, min(self.most, -(-self.bytes // max(size, 1))))


class Setup:
    """Makes a case's inputs; two of them make the same.

    With ``mixed``, positions and thresholds differ from row to row as they do between texts, which
    is for checks; else all rows have the whole context and all may leave.
    """

    def __init__(self, shape: Shape, copies: Copies | None = None, *, mixed: bool = False) -> None:
        self.config = shape.config
        self.dtype = shape.dtype
        self.device = shape.device
        self.context = shape.context
        self.mixed = mixed
        self.copies = copies or Copies()
        self._generator = torch.Generator(shape.device).manual_seed(_SEED)
        self._random = Random(_SEED)  # noqa: S311 (inputs of a benchmark)

    def normal(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed numbers of the model's dtype."""
        dtype = dtype or self.dtype
        return torch.randn(sizes, generator=self._generator, dtype=dtype, device=self.device)

    def weight(self, outs: int, ins: int) -> Tensor:
        """A matrix [outs, ins] that keeps the size of what it is multiplied with."""
        return self.normal(outs, ins).mul_(ins**-0.5)

    def uniform(self, *sizes: int) -> Tensor:
        """Numbers in [0, 1), fp32."""
        return torch.rand(sizes, generator=self._generator, device=self.device)

    def zeros(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros of the model's dtype."""
        return torch.zeros(sizes, dtype=dtype or self.dtype, device=self.device)

    def tokens(self, number: int) -> Tensor:
        """Ids of tokens [number]."""
        return torch.randint(
            self.config.vocab_size, (number,), generator=self._generator, device=self.device
        )

    def order(self, number: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers below ``number`` in random order."""
        return torch.randperm(number, generator=self._generator, device=self.device).to(dtype)

    def count(self, number: int) -> Tensor:
        """A count as kernels read it, int32 [1]."""
        return torch.tensor([number], dtype=torch.int32, device=self.device)

    def thresholds(self, number: int) -> Tensor:
        """Exit thresholds [number]: all 0, so that every row leaves; ``mixed``, some above 1."""
        return 1.5 * self.uniform(number) if self.mixed else torch.zeros_like(self.uniform(number))

    def positions(self, number: int) -> list[int]:
        """Positions of the newest tokens."""
        if self.mixed:
            return [self._random.randrange(self.context) for _ in range(number)]
        return [self.context - 1] * number

    def rotary(self) -> RotaryTable:
        """Angles of all positions."""
        inv_freq = torch.tensor(self.config.inv_freq)
        scale = self.config.rope_scale
        return RotaryTable(inv_freq, self.context, scale, self.dtype, self.device)

    def copied(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors and copies of them, as many as ``copies`` says."""
        number = self.copies.of(size_of(*tensors))
        return [tensors, *(tuple(each.clone() for each in tensors) for _ in range(number - 1))]


Maker = Callable[[Setup, int, int], Iterator[Case]]
"""Makes an op's cases for a number of rows, and the number of them that are active."""


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(each.numel() * each.element_size() for each in tensors)


def cold_bytes(copies: Sequence[tuple[Tensor, ...]]) -> int:
    """Bytes that are read before any is read again."""
    return sum(size_of(*each) for each in copies)


def newest_rows(setup: Setup, limit: int, count: int) -> tuple[Tensor, Tensor, RowTable]:
    """``limit`` texts with a row each at its newest token; ``count`` of the rows are active.

    One layer's keys and values [places, kv_heads, head_dim], in pages whose blocks have no order,
    and where the rows stand in them.
    """
    positions = setup.positions(count)
    return _texts(setup, limit, list(range(limit)), [*positions, *[0] * (limit - count)], count)


def last_rows(setup: Setup, number: int) -> tuple[Tensor, Tensor, RowTable]:
    """The same for one text whose last ``number`` positions are rows."""
    first = max(0, setup.context - number)
    return _texts(setup, 1, [0] * number, list(range(first, first + number)), None)


def _texts(
    setup: Setup, texts: int, owners: list[int], positions: list[int], count: int | None
) -> tuple[Tensor, Tensor, RowTable]:
    config = setup.config
    each = -(-max(setup.context, max(positions) + 1) // BLOCK)
    blocks = setup.order(texts * each)
    owner, position = (torch.tensor(x, device=setup.device) for x in (owners, positions))
    first = owner * each
    k, v = setup.normal(2, texts * each * BLOCK, config.num_kv_heads, config.head_dim)
    # Attention does not rotate, so there are no angles.
    cos, sin = (setup.zeros(0, 1, config.head_dim) for _ in range(2))
    rows = RowTable(
        places=blocks[first + position // BLOCK] * BLOCK + position % BLOCK,
        positions=position,
        first_blocks=first,
        blocks=blocks,
        block_size=BLOCK,
        longest=each * BLOCK,
        cos=cos,
        sin=sin,
        count=None if count is None else setup.count(count),
        # Attention of a prompt needs them; the rows then are of one text.
        spans=[Span(positions, ())] if texts == 1 else [],
    )
    return k, v, rows


def check(name: str, make: Maker, shape: Shape, rows: int) -> None:
    """Run an op's cases and their references on inputs of the model's widths; Refused if not alike.

    A quarter of the rows lies behind the count, if there are that many.
    """
    short = replace(shape, context=min(shape.context, _CONTEXT))
    count = rows - rows // 4
    pairs = zip(*(make(Setup(short, mixed=True), rows, count) for _ in range(2)), strict=True)
    for case, model in pairs:
        where = f"{name}, {case.what}, {count} of {rows} rows"
        try:
            case.launches[0]()
            synchronise(shape.device)
        # Compilers and drivers raise errors of many kinds; the message says where.
        except Exception as error:
            raise Refused(f"{where}: {type(error).__name__}: {error}") from error
        model.reference()
        results, expected = case.results(), model.results()
        assert results.keys() == expected.keys()
        for part, value in results.items():
            found = difference(value, expected[part], case.rounding or shape.dtype)
            if found is not None:
                raise Refused(f"{where}: {part} {found}")


def difference(value: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """How ``value`` differs from ``expected``; None if within the tolerance of ``dtype``."""
    if value.shape != expected.shape:
        return f"is {list(value.shape)} instead of {list(expected.shape)}"
    if not value.is_floating_point():
        wrong = int((value != expected).sum())
        return f"differs in {wrong} of {value.numel()}" if wrong else None
    error = (value.float() - expected.float()).abs()
    # Places that were not written do not show how large results are.
    written = expected[expected != 0].float()
    usual = written.square().mean().sqrt() if len(written) else 0.0
    allowed = TOLERANCE[dtype] * (usual + expected.float().abs())
    # Written so that NaN is wrong.
    wrong = int((~(error <= allowed)).sum())
    if not wrong:
        return None
    most = float(error.nan_to_num(nan=float("inf")).max())
    return f"differs in {wrong} of {value.numel()}, by up to {most:.3g}"


def measure_case(setup: Setup, case: Case, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """Time a case, then the same launches without active rows, for ``seconds`` each."""
    clock = Clock(case.launches, setup.device)
    timing = clock.time(seconds)
    empty = None
    if case.empty is not None:
        case.empty()
        empty = clock.time(seconds)
    return figures(case, timing, empty, ceilings)


def figures(case: Case, timing: Timing, empty: Timing | None, ceilings: Ceilings) -> dict[str, Any]:
    """Times in microseconds; ``share`` is the least time by the ceilings to the median one."""
    work = case.work
    least, ceiling = ceilings.bound(work.bytes, work.flops)
    return {
        "op": case.op,
        "what": case.what,
        "rows": case.rows,
        "us": round(1e6 * timing.median, 3),
        "us_least": round(1e6 * timing.least, 3),
        "empty_us": None if empty is None else round(1e6 * empty.median, 3),
        "read_bytes": work.read,
        "written_bytes": work.written,
        "flops": work.flops,
        "megabytes": work.bytes / 1e6,
        "gigaflops": work.flops / 1e9,
        "gb_per_s": round(work.bytes / timing.median / 1e9, 3),
        "tflop_per_s": round(work.flops / timing.median / 1e12, 6),
        "ceiling": ceiling,
        "share": round(least / timing.median, 6),
        "cold_bytes": case.cold,
        "samples": timing.samples,
        "launches": timing.launches,
    }
