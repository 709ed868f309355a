"""Fit the maps that make K and V of skipped layers from the exit state.

ADEPT (arXiv 2601.03700) decouples the skipped layers' K,V from their chain with a learned
hidden-state map. K and V are linear in a layer's normalised input, so mapping the exit state
straight to K and V is the best linear map there is, and at run time it costs no more than the
identity map: one GEMM. It is fitted in closed form, as a ridge correction of the identity map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.kernels.rms_norm import rms_norm
from offramp.models.exits.training.hidden_states import Answer, batches, lay_out
from offramp.models.transformer import Transformer, identity_projection

# Ridge strength relative to the inputs' mean power: small against tens of thousands of tokens, and
# enough to keep directions that hardly occur at the identity map.
_RIDGE = 1e-3


class _Normal:
    """Normal equations of one exit's map: inputs against residuals of the identity map."""

    def __init__(self, model: Transformer, first: int) -> None:
        self.weight, self.bias = identity_projection(model, first)
        d = model.config.hidden_size
        self.xx = torch.zeros(d + 1, d + 1, dtype=torch.float64)
        self.xy = torch.zeros(d + 1, self.weight.shape[0], dtype=torch.float64)

    def add(self, x: Tensor, kv: Tensor) -> None:
        """Learn from ``x`` [n, d] and the true K,V ``kv`` [n, layers * 2 * kv_size]."""
        residual = kv - torch.nn.functional.linear(x, self.weight, self.bias)
        inputs = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
        self.xx += (inputs.t() @ inputs).double().cpu()
        self.xy += (inputs.t() @ residual).double().cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the map."""
        ridge = _RIDGE * self.xx.diagonal().mean()
        eye = torch.eye(len(self.xx), dtype=torch.float64)
        correction = torch.linalg.solve(self.xx + ridge * eye, self.xy).to(self.weight)
        bias = correction[-1] if self.bias is None else self.bias + correction[-1]
        return self.weight + correction[:-1].t(), bias


@torch.inference_mode()
def fit_kv_maps(
    model: Transformer, answers: Sequence[Answer], progress: Callable[[int], None] | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Weight [layers * 2 * kv_size, d] and bias of the map of each exit layer of ``model``.

    Targets are K (before its norm and rotation) and V of the skipped layers at the positions that
    make answer tokens, teacher-forced. ``progress`` is called with the number of answers done.
    """
    normal = {layer: _Normal(model, layer) for layer in model.exit_layers}
    done = 0
    for batch in batches(answers, range(len(answers))):
        _accumulate(model, [(i, answers[i]) for i in batch], normal)
        done += len(batch)
        if progress is not None:
            progress(done)
    return {layer: equations.solve() for layer, equations in normal.items()}


def _accumulate(
    model: Transformer, batch: Sequence[tuple[int, Answer]], normal: dict[int, _Normal]
) -> None:
    eps, start = model.config.rms_norm_eps, model.config.query_size
    layout = lay_out(model, batch)
    hidden = layout.hidden
    states: dict[int, Tensor] = {}
    kv: dict[int, Tensor] = {}
    for layer in model.layers:
        if layer.index >= model.exit_layers[0]:
            states[layer.index] = hidden[layout.rows]
            kv[layer.index] = layer.qkv(rms_norm(states[layer.index], layer.attn_norm, eps))[
                :, start:
            ]
        hidden = layer(hidden, layout.at, layout.cache)
    for first, equations in normal.items():
        above = torch.cat([kv[index] for index in sorted(kv) if index >= first], dim=1)
        equations.add(rms_norm(states[first], None, eps), above)
