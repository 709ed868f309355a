"""Weight matrices kept for CPU products: one class a form, each with its own check.

Times of all products of one step of SmolLM2-135M without its LM head, two threads of a processor
with AVX-512 and AMX, milliseconds (1 / 4 / 16 / 64 rows), and agreement of greedy tokens with fp32:

    int4, ours, with AMX  3 /  5 / 10 / 20    1
    int4, ours            4 /  6 / 17 / 53    1
    int8, ours            7 /  8 / 19 / 56    1
    fp16, ours           11 / 16 / 22 / 59    0.9995
    fp32, ours           15 / 20 / 32 / 71    1
    fp16, FBGEMM         11 / 15 / 28 / 56    0.9995
    fp32, oneDNN         19 / 20 / 28 / 60    1
    bf16, oneDNN         12 / 12 / 14 / 20    0.993

Our own forms compute in fp32 with the weights as they are stored, and give a row the same result
whatever rows are beside it. Torch's operators serve where those cannot be compiled; some of them
come without a promise to outside callers, so each is tried out before it is used (`available`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.native import Library, Matrix, library

GROUP = 32
"""Columns that share a scale in the 8-bit and 4-bit forms (ggml's Q8_0 and Q4_1)."""
_LEVELS = 15
_LARGEST_BYTE = 127
_SPARE = 64
_BLOCK_ROWS = 2048


class WeightForm(StrEnum):
    """How a weight matrix is kept, and by whose product it serves."""

    PLAIN = "plain"
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    FBGEMM_FP16 = "fbgemm-fp16"
    ONEDNN_FP32 = "onednn-fp32"
    ONEDNN_BF16 = "onednn-bf16"


_NATIVE = (WeightForm.FP32, WeightForm.FP16, WeightForm.INT8, WeightForm.INT4)
"""Forms of the C kernels, in their order there."""


class Packed(Protocol):
    """A packed weight [out, in]; ``nbytes`` is what a product reads of memory."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] fp32 to [n, out] fp32."""
        ...


class PackError(ValueError):
    """The weight cannot be kept in this form."""


class Native:
    """A form of the C kernels; ``matrix`` is what they take."""

    def __init__(self, weight: Tensor, bias: Tensor | None, form: WeightForm) -> None:
        found = library()
        if found is None or weight.device.type != "cpu":
            raise PackError(f"{form} needs the C kernels, and they a CPU")
        self._library: Library = found
        self._data = _stored(weight.float(), form)
        self._bias = None if bias is None else bias.float().contiguous()
        self.nbytes = self._data.nbytes
        self.matrix = Matrix(
            _NATIVE.index(form),
            *weight.shape,
            self._data.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] fp32 to [n, out] fp32."""
        return self._library.product(self.matrix, x.contiguous())

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [n] of the weight, [n, in]."""
        return self._library.rows(self.matrix, ids.contiguous())


class _OneDNN:
    """fp32 or bf16 weights in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        # The row count is a hint; layouts packed for 4 to 256 rows were equally fast at all counts.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 16)  # noqa: SLF001
        self._dtype = dtype
        self._bias = None if bias is None else bias.to(dtype)
        self.nbytes = weight.numel() * dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x.to(self._dtype), self._weight, self._bias, "none", [], ""
        )
        return out.float()


class _FBGEMM:
    """fp16 weights, fp32 activations and sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        _hold_in_fp16(weight)
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        self.nbytes = weight.numel() * torch.float16.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


class Plain:
    """The weight as it is, for what has no packed form."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias = weight, bias
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] to [n, out]."""
        return F.linear(x, self.weight, self._bias)


def pack(weight: Tensor, bias: Tensor | None, form: WeightForm) -> Packed:
    """``weight`` [out, in] with ``bias`` [out] in ``form``; raises PackError if it cannot be."""
    match form:
        case WeightForm.PLAIN:
            return Plain(weight, bias)
        case WeightForm.ONEDNN_FP32:
            return _OneDNN(weight, bias, torch.float32)
        case WeightForm.ONEDNN_BF16:
            return _OneDNN(weight, bias, torch.bfloat16)
        case WeightForm.FBGEMM_FP16:
            return _FBGEMM(weight, bias)
        case _:
            return Native(weight, bias, form)


@functools.cache
def available(form: WeightForm) -> bool:
    """Whether products in ``form`` exist on this machine and are right.

    oneDNN's bf16 asks for hardware support too: emulated, it is slower than fp32.
    """
    levels = torch.arange(32 * 2 * GROUP).view(32, 2 * GROUP) * 7 % (_LEVELS + 1)
    weight, x = levels / 8.0 - 1.0, torch.arange(3.0 * 2 * GROUP).view(3, -1) / 64
    if form is WeightForm.INT8:
        # Its largest value stands for the largest level.
        weight = torch.where(levels == 0, 127 / 64, weight)
    bias = torch.arange(32.0)
    try:
        if (
            form is WeightForm.ONEDNN_BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
        ):
            return False
        with torch.inference_mode():
            out = pack(weight, bias, form)(x)
    except (AttributeError, NotImplementedError, RuntimeError, PackError):
        return False
    return torch.allclose(out, F.linear(x, weight, bias), rtol=0.02, atol=0.02)


def keeps(form: WeightForm, weight: Tensor) -> bool:
    """Whether ``form`` can hold ``weight`` [out, in], the integer forms exactly."""
    try:
        if form in _NATIVE:
            _stored(weight.float(), form)
        elif form is WeightForm.FBGEMM_FP16:
            _hold_in_fp16(weight)
    except PackError:
        return False
    return True


def _stored(weight: Tensor, form: WeightForm) -> Tensor:
    """``weight`` [out, in] as the bytes the C kernels read, see there; raises PackError."""
    if weight.shape[1] % GROUP:
        raise PackError(f"the C kernels take columns in {GROUP}s")
    match form:
        case WeightForm.FP32:
            return weight.contiguous()
        case WeightForm.FP16:
            _hold_in_fp16(weight)
            return weight.half().contiguous()
        case WeightForm.INT8:
            return _in_blocks(_bytes8, weight)
        case _:
            return _in_blocks(_bytes4, weight)


def _in_blocks(convert: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Rows converted some at a time, for it takes several times their memory; then spare bytes."""
    rows = [convert(block).flatten() for block in weight.split(_BLOCK_ROWS)]
    return torch.cat((*rows, torch.zeros(_SPARE, dtype=torch.uint8)))


def _hold_in_fp16(weight: Tensor) -> None:
    largest = torch.finfo(torch.float16).max
    if weight.abs().max() > largest:
        raise PackError(f"fp16 holds no weights beyond {largest:.0f}")


def _groups(weight: Tensor) -> Tensor:
    return weight.view(weight.shape[0], weight.shape[1] // GROUP, GROUP)


def _bytes8(weight: Tensor) -> Tensor:
    """fp16 scale and 32 levels for each group, whose largest magnitude is level 127."""
    groups = _groups(weight)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / _LARGEST_BYTE).half()
    levels = (groups / _divisor(scale)).round()
    _compare(levels * scale.float(), groups, 8)
    return _rows(scale, levels.to(torch.int8))


def _bytes4(weight: Tensor) -> Tensor:
    """fp16 scale, fp16 lowest value and 32 half bytes for each group, which has levels 0 and 15."""
    groups = _groups(weight)
    low = groups.amin(dim=-1, keepdim=True)
    # Scales are fp16 in the file; the quotient only finds out which.
    scale = ((groups.amax(dim=-1, keepdim=True) - low) / _LEVELS).half()
    levels = ((groups - low) / _divisor(scale)).round().clamp_max_(_LEVELS)
    _compare(levels * scale.float() + low.half().float(), groups, 4)
    first, second = levels.to(torch.uint8).chunk(2, dim=-1)
    return _rows(scale, low.half(), first | (second << 4))


def _rows(*parts: Tensor) -> Tensor:
    """Parts [out, groups, n] one after another in each row."""
    return torch.cat([part.flatten(1).view(torch.uint8) for part in parts], dim=1)


def _divisor(scale: Tensor) -> Tensor:
    return scale.float().clamp_min(torch.finfo(torch.float16).tiny)


def _compare(kept: Tensor, groups: Tensor, bits: int) -> None:
    if not ((kept - groups).abs() <= 1e-6 * groups.abs() + 1e-7).all():
        raise PackError(f"the weights do not lie on a {bits}-bit grid")
