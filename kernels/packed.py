"""Weight matrices packed for CPU products: one class a form, each with its own check.

Times of all products of one step of SmolLM2-135M without its LM head, two threads of a processor
with AVX-512 and AMX, milliseconds (1 / 4 / 16 / 64 rows), and agreement of greedy tokens with fp32:

    fp32, oneDNN          19 / 20 / 28 / 60    1
    fp16, FBGEMM          11 / 15 / 28 / 56    0.9995
    bf16, oneDNN          12 / 12 / 14 / 20    0.993
    int4, torch           4 /  6 / 23 / 81     0.991

The operators are torch's, some of them without a promise to outside callers, so every form is tried
out before it is used (`available`).
"""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
"""Columns that share a scale in the 4-bit form (ggml's Q4_1)."""
_LEVELS = 15
_MIDDLE = 8


class WeightForm(StrEnum):
    """How a weight matrix is kept."""

    PLAIN = "plain"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT4 = "int4"


class Packed(Protocol):
    """A packed weight [out, in]."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] fp32 to [n, out] fp32."""
        ...


class PackError(ValueError):
    """The weight cannot be kept in this form."""


class _OneDNN:
    """fp32 or bf16 weights in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        # The row count is a hint; layouts packed for 4 to 256 rows were equally fast at all counts.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 16)  # noqa: SLF001
        self._dtype = dtype
        self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x.to(self._dtype), self._weight, self._bias, "none", [], ""
        )
        return out.float()


class _FP16:
    """fp16 weights, fp32 activations and sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


class _Int4:
    """4-bit weights with a scale and an offset for each group of columns, bf16 activations.

    Raises PackError unless the weight already lies on such a grid, as that of a model published in
    Q4_1 does: this form stores those weights, it quantises no others.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        levels, scale, low = _grid(weight)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)  # noqa: SLF001
        offset = low + _MIDDLE * scale
        self._scales = torch.stack((scale.t(), offset.t()), dim=-1).to(torch.bfloat16).contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001
            x.to(torch.bfloat16), self._packed, GROUP, self._scales
        )
        return out.float() if self._bias is None else out.float() + self._bias


class _Plain:
    """The weight as it is, for what has no packed form."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


def pack(weight: Tensor, bias: Tensor | None, form: WeightForm) -> Packed:
    """``weight`` [out, in] with ``bias`` [out] in ``form``; raises PackError if it cannot be."""
    match form:
        case WeightForm.PLAIN:
            return _Plain(weight, bias)
        case WeightForm.FP32:
            return _OneDNN(weight, bias, torch.float32)
        case WeightForm.BF16:
            return _OneDNN(weight, bias, torch.bfloat16)
        case WeightForm.FP16:
            largest = torch.finfo(torch.float16).max
            if weight.abs().max() > largest:
                raise PackError(f"fp16 holds no weights beyond {largest:.0f}")
            return _FP16(weight, bias)
        case WeightForm.INT4:
            return _Int4(weight, bias)


@functools.cache
def available(form: WeightForm) -> bool:
    """Whether products in ``form`` exist in this build of torch and are right.

    bf16 asks for hardware support too: emulated, it is slower than fp32.
    """
    levels = torch.arange(32 * 2 * GROUP).view(32, 2 * GROUP) * 7 % (_LEVELS + 1)
    weight, x = levels / 8.0 - 1.0, torch.arange(3.0 * 2 * GROUP).view(3, -1) / 64
    bias = torch.arange(32.0)
    try:
        if form is WeightForm.BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001
            return False
        with torch.inference_mode():
            out = pack(weight, bias, form)(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(out, F.linear(x, weight, bias), rtol=0.02, atol=0.02)


def on_grid(weight: Tensor) -> bool:
    """Whether ``weight`` [out, in] can be kept in 4 bits without losing anything."""
    try:
        _grid(weight)
    except PackError:
        return False
    return True


def _grid(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [out, in] in 0 .. 15, and scale and lowest value [out, groups] of each group.

    Every group of a Q4_1 matrix reaches level 0 and level 15, so both can be read off its values.
    """
    rows, columns = weight.shape
    if columns % GROUP or rows % 16:
        raise PackError(f"4-bit weights have columns in {GROUP}s and rows in 16s")
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    low = groups.amin(dim=-1, keepdim=True)
    # Scales are fp16 in the file; the quotient only finds out which.
    scale = ((groups.amax(dim=-1, keepdim=True) - low) / _LEVELS).half().float()
    levels = ((groups - low) / scale.clamp_min(torch.finfo(torch.float16).tiny)).round()
    error = (levels * scale + low - groups).abs()
    if levels.max() > _LEVELS or not (error <= 1e-6 * groups.abs() + 1e-7).all():
        raise PackError("the weights do not lie on a 4-bit grid")
    return levels.to(torch.int32).view(rows, columns), scale.squeeze(-1), low.squeeze(-1)
