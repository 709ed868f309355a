"""Rows chosen on the device, whose number the host does not know."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offramp.kernels.backend import jit, tl


@dataclass(frozen=True, slots=True)
class RowList:
    """The first ``count`` of ``rows``; what lies behind them means nothing.

    ``rows`` [n] and ``count`` [1] are int32. Kernels are launched for all n and those behind the
    count return at once, so no launch waits for the host to learn it.
    """

    rows: Tensor
    count: Tensor

    @property
    def chosen(self) -> Tensor:
        """The rows as indices [count]; waits for the device, so for references only."""
        return self.rows[: int(self.count)].long()


@jit
def behind(row: tl.tensor, count: tl.tensor | None) -> tl.tensor:
    """Whether a row lies behind a count on the device (None: there is no count)."""
    late = row < 0
    if count is not None:
        late = row >= tl.load(count)
    return late
