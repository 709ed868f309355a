"""One op on inputs that lie on the device: what is launched, and what that costs at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Launch = Callable[[], object]
"""What it gives back is of no interest."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot do without: bytes ``read`` and ``written``, each once, and ``flops``.

    An op that reads something twice, or keeps partial results, is not forgiven for it.
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
    """One op, ``what`` it is about, and the ``rows`` it works on.

    ``launches`` are the same call on copies of what it reads in bulk, ``cold`` bytes in all, so
    that in a long row of launches none finds its input in a cache; 0 where a model, too, would
    find it there. ``reference`` is the plain operators' version of the first, ``results`` what
    either wrote, as exact as ``rounding`` allows (None: the model's dtype). ``empty`` lets nobody
    ride from now on (None: the op has no count on the device).
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
