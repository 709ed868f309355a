"""Checkpoints of a training: parameters, the optimizer's moments, and plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save_checkpoint(
    path: Path, params: Sequence[Tensor], optimizer: torch.optim.Optimizer, **values: Any
) -> None:
    """Write ``path`` atomically; ``values`` are plain ones by name."""
    partial = path.with_suffix(".partial")
    kept = [param.detach().cpu() for param in params]
    torch.save({**values, "params": kept, "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def restore_checkpoint(
    path: Path, params: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put back what `save_checkpoint` wrote, in place; returns the values."""
    # On the CPU: the optimizer places its moments by their parameters, and wants its step counts
    # here.
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for param, kept in zip(params, state.pop("params"), strict=True):
            param.copy_(kept)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state
