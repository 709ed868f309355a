"""Formats of weight matrices for CPU products: one class for each, checked before it is used.

Times of all products of one step of SmolLM2-135M without its LM head, two threads of a processor
with AVX-512 and AMX, milliseconds (1 / 4 / 16 / 64 rows), and agreement of greedy tokens with fp32:

    fp16, C              11 / 16 / 22 / 59    0.9995
    fp32, C              15 / 20 / 32 / 71    1
    fp16, FBGEMM         11 / 15 / 28 / 56    0.9995
    fp32, oneDNN         19 / 20 / 28 / 60    1
    bf16, oneDNN         12 / 12 / 14 / 20    0.993

The C kernels take the weights as they are stored, compute in fp32 or, for 8 and 4 bits, with
integers (native/matmul_integer.h), and give a row the same result whatever rows are beside it.
From eight rows on integer products take half the time of the same in fp32 with AVX-512, two thirds
with AVX2 (docs/kernels.md); 0.9999 of greedy tokens agree. Torch's operators serve
where there is no C compiler, and for bf16.
FBGEMM's and oneDNN's are not part of torch's documented interface, so `available` tries each out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.bounds import check_shape, check_size
from offramp.kernels.memory import Arena
from offramp.kernels.native import library
from offramp.kernels.native_structures import Matrix

GROUP = 32
"""Columns that share a scale in the 8-bit and 4-bit formats (ggml's Q8_0 and Q4_1)."""
_LEVELS = 15
_LARGEST_BYTE = 127
# What rounding a scale and a lowest value to fp16 moves the values of a 4-bit group by at most,
# relative to its largest: half a unit in the last place of each end of the levels, and of the low.
_FP16_ENDS = 3 * 2.0**-11
_SAMPLE_ROWS = 8
_BLOCK_ROWS = 2048
_SET = 32
# Columns of one word of levels, in the order of its bytes; of 4 bits the low halves, then the high.
_INT8_ORDER = (0, 2, 1, 3)
_INT4_ORDER = ((0, 4, 1, 5), (2, 6, 3, 7))


class WeightFormat(StrEnum):
    """How a weight matrix is stored, and whose product reads it; PLAIN is the tensor itself."""

    PLAIN = "plain"
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    FBGEMM_FP16 = "fbgemm-fp16"
    ONEDNN_FP32 = "onednn-fp32"
    ONEDNN_BF16 = "onednn-bf16"


_NATIVE = {
    WeightFormat.FP32: "FORMAT_FP32",
    WeightFormat.FP16: "FORMAT_FP16",
    WeightFormat.INT8: "FORMAT_INT8",
    WeightFormat.INT4: "FORMAT_INT4",
}
"""Formats of the C kernels, with the names of their constants there."""

INTEGERS = (WeightFormat.INT4, WeightFormat.INT8)
"""Formats whose products add up integers, the smaller one first."""

ARENA = Arena()
"""Where weights lie."""


class PackedWeight(Protocol):
    """A weight [out, in] with its bias; ``nbytes`` is what a product reads from memory."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] fp32 to [n, out] fp32."""
        ...


class PackError(ValueError):
    """The weight cannot be stored in this format."""


class NativeWeight:
    """A format of the C kernels; ``matrix`` is the structure they take.

    Raises PackError without the C kernels, on another device than a CPU, and if the format cannot
    hold the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, form: WeightFormat) -> None:
        found = library()
        if found is None or weight.device.type != "cpu":
            raise PackError(f"{form} needs the C kernels, and they a CPU")
        self._library = found
        outs, columns = weight.shape
        check_size("rows of a weight", outs)
        check_size("columns of a weight", columns)
        data = _encode(weight.float(), form)
        # fp32 may be the model's own tensor; no second one is made.
        self._data = data if form is WeightFormat.FP32 else ARENA.copy(data)
        self._bias = None if bias is None else bias.float().contiguous()
        if self._bias is not None:
            check_shape("bias", self._bias, (outs,))
        self.nbytes = self._data.nbytes
        self.matrix = Matrix(
            found.constant(_NATIVE[form]),
            *weight.shape,
            self._data.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )

    def __call__(self, x: Tensor, coarse: Tensor | None = None) -> Tensor:
        """``x`` [n, in] fp32 to [n, out] fp32.

        Integer formats take 8 bits of the inputs of rows that are ``coarse`` [n] (bool).
        """
        return self._library.matmul(self.matrix, x.contiguous(), coarse)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [n] of the weight, [n, in]."""
        return self._library.rows(self.matrix, ids.contiguous())


class _OneDNNWeight:
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


class _FBGEMMWeight:
    """fp16 weights, fp32 activations and sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        _check_fp16_range(weight)
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        self.nbytes = weight.numel() * torch.float16.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


class PlainWeight:
    """The weight tensor itself, of any dtype and on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self._bias = weight, bias
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [n, in] to [n, out]."""
        return F.linear(x, self.weight, self._bias)


def pack(weight: Tensor, bias: Tensor | None, form: WeightFormat) -> PackedWeight:
    """``weight`` [out, in] with ``bias`` [out] in ``form``; raises PackError if it cannot be."""
    match form:
        case WeightFormat.PLAIN:
            return PlainWeight(weight, bias)
        case WeightFormat.ONEDNN_FP32:
            return _OneDNNWeight(weight, bias, torch.float32)
        case WeightFormat.ONEDNN_BF16:
            return _OneDNNWeight(weight, bias, torch.bfloat16)
        case WeightFormat.FBGEMM_FP16:
            return _FBGEMMWeight(weight, bias)
        case _:
            return NativeWeight(weight, bias, form)


def pack_first(weight: Tensor, bias: Tensor | None, forms: Sequence[WeightFormat]) -> PackedWeight:
    """``weight`` [out, in] with ``bias`` [out] in the first of ``forms`` that can store it.

    Raises PackError if none can.
    """
    for form in forms[:-1]:
        with suppress(PackError):
            return pack(weight, bias, form)
    return pack(weight, bias, forms[-1])


@functools.cache
def available(form: WeightFormat) -> bool:
    """Whether products in ``form`` exist on this machine and are right.

    oneDNN's bf16 needs support by the processor too: emulated, it is slower than fp32.
    """
    levels = torch.arange(32 * 2 * GROUP).view(32, 2 * GROUP) * 7 % (_LEVELS + 1)
    weight, x = levels / 8.0 - 1.0, torch.arange(3.0 * 2 * GROUP).view(3, -1) / 64
    if form is WeightFormat.INT8:
        # A group's largest value gets the largest level, so each group needs one of 127.
        weight = torch.where(levels == 0, 127 / 64, weight)
    bias = torch.arange(32.0)
    try:
        if (
            form is WeightFormat.ONEDNN_BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001
        ):
            return False
        with torch.inference_mode():
            out = pack(weight, bias, form)(x)
    except (AttributeError, NotImplementedError, RuntimeError, PackError):
        return False
    return torch.allclose(out, F.linear(x, weight, bias), rtol=0.02, atol=0.02)


def can_hold(form: WeightFormat, weight: Tensor) -> bool:
    """Whether ``form`` can store ``weight`` [out, in].

    INT8 must do so exactly, INT4 but for fp16's rounding of scales and lowest values, which moves
    no weight by more than 3 * 2**-11 of its group's largest (ggml's Q4_K has 17 bits of scale).
    """
    try:
        if form is WeightFormat.INT4:
            _check_columns(weight)
            _near_grid(_groups(weight.float()))
        elif form in _NATIVE:
            _encode(weight.float(), form)
        elif form is WeightFormat.FBGEMM_FP16:
            _check_fp16_range(weight)
    except PackError:
        return False
    return True


def first_to_hold(forms: Sequence[WeightFormat], weight: Tensor) -> WeightFormat:
    """The first of ``forms`` that can store ``weight``; the last, which must, is not asked."""
    return next((form for form in forms[:-1] if can_hold(form, weight)), forms[-1])


def nearest(form: WeightFormat, weight: Tensor) -> Tensor:
    """``weight`` [out, in] in fp32 rounded to values that INT8 or INT4 store exactly.

    Itself if they can hold it already. Raises PackError for columns that are no multiple of 32, and
    for values that fp16 scales do not reach.
    """
    if weight.shape[1] % GROUP:
        raise PackError(f"groups have {GROUP} columns, the weight {weight.shape[1]}")
    _check_fp16_range(weight)
    if can_hold(form, weight):
        return weight
    parts = weight.split(_BLOCK_ROWS)
    if form is WeightFormat.INT8:
        return torch.cat([_round_to_int8(part) for part in parts])
    return torch.cat([round_to_int4(part)[1] for part in parts])


def _encode(weight: Tensor, form: WeightFormat) -> Tensor:
    """``weight`` [out, in] as native/weight_formats.h describes it; raises PackError."""
    _check_columns(weight)
    match form:
        case WeightFormat.FP32:
            return weight.contiguous()
        case WeightFormat.FP16:
            _check_fp16_range(weight)
            return weight.half().contiguous()
        case WeightFormat.INT8:
            return _in_blocks(_encode_int8, weight)
        case _:
            return _in_blocks(_encode_int4, weight)


def _check_columns(weight: Tensor) -> None:
    if weight.shape[1] % GROUP:
        raise PackError(f"the C kernels take columns in {GROUP}s")


def _in_blocks(convert: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Rows converted some at a time, because a conversion takes several times their memory."""
    return torch.cat([convert(block).flatten() for block in weight.split(_BLOCK_ROWS)])


def _check_fp16_range(weight: Tensor) -> None:
    largest = torch.finfo(torch.float16).max
    if weight.abs().max() > largest:
        raise PackError(f"fp16 holds no weights beyond {largest:.0f}")


def _groups(weight: Tensor) -> Tensor:
    return weight.view(weight.shape[0], weight.shape[1] // GROUP, GROUP)


def _encode_int8(weight: Tensor) -> Tensor:
    """Q8_0: fp16 scales, then 32 signed bytes a group, whose largest magnitude is level 127."""
    groups = _groups(weight)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / _LARGEST_BYTE).half()
    levels = (groups / _divisor(scale)).round()
    _check_grid(levels * scale.float(), groups, 8)
    return _sets(levels.to(torch.int8).unflatten(-1, (-1, 4))[..., _INT8_ORDER], scale)


def _round_to_int8(weight: Tensor) -> Tensor:
    groups = _groups(weight)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    # The largest value gets level 127 whatever its scale is rounded to, as the encoding expects.
    levels = (groups * (_LARGEST_BYTE / largest).nan_to_num(0.0, posinf=0.0)).round_()
    scale = (largest / _LARGEST_BYTE).half()
    return levels.mul_(scale.float()).view(weight.shape)


def _encode_int4(weight: Tensor) -> Tensor:
    """Q4_1: fp16 scales, fp16 minima, then 32 half bytes a group."""
    return _int4_sets(*_near_grid(_groups(weight)))


def _near_grid(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scales and lowest values as of `int4_grid`, of groups that need not have them all.

    Where the highest level of a group is not 15, as in ggml's Q4_0 and Q4_K, it is searched for.
    Raises PackError if a group is no nearer to a grid than scales in fp16 allow.
    """
    # Weights that lie on no grid are most; a few rows show it.
    if len(groups) > _SAMPLE_ROWS:
        _near_grid(groups[:_SAMPLE_ROWS])
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    bound = _FP16_ENDS * torch.maximum(low.abs(), high.abs()) + 1e-7
    levels, scale = _levels(groups, low, high, _LEVELS)
    far = _distance(groups, levels, scale, low) > bound
    for top in range(_LEVELS - 1, 0, -1):
        at = far.flatten().nonzero().squeeze(1)
        if not len(at):
            break
        own, first, last, most = (part.flatten(0, 1)[at] for part in (groups, low, high, bound))
        found, step = _levels(own, first, last, top)
        near = (_distance(own, found, step, first) <= most).flatten()
        levels.view(-1, GROUP)[at[near]] = found[near]
        scale.view(-1, 1)[at[near]] = step[near]
        far.view(-1)[at[near]] = False
    if far.any():
        raise PackError("the weights do not lie on a 4-bit grid")
    return levels, scale, low.half()


def _levels(groups: Tensor, low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The levels of groups [..., 32] whose highest is ``top``, and their scales [..., 1]."""
    # The file's scale was fp16, so rounding the quotient to fp16 recovers it.
    scale = ((high - low) / top).half()
    return ((groups - low) / _divisor(scale)).round_().clamp_max_(top), scale


def _distance(groups: Tensor, levels: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """By how much what is stored is off at most in each group."""
    stored = torch.addcmul(low.half().float(), levels, scale.float())
    return (stored - groups).abs_().amax(dim=-1, keepdim=True)


def _int4_sets(levels: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    words = levels.to(torch.uint8).unflatten(-1, (-1, 8))
    first, second = (words[..., order] for order in _INT4_ORDER)
    return _sets(first | (second << 4), scale, low)


def round_to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [out, in] in fp32 rounded to 4 bits: as the C kernels store it, and its values.

    Levels lie between a group's ends, scale and lowest value on the line through them that fits
    best (least squares). Values beyond what fp16 holds become infinite, or NaN.
    """
    groups = _groups(weight)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    levels = ((groups - low) * (_LEVELS / (high - low)).nan_to_num(0.0, posinf=0.0)).round_()
    middle, mean = levels.mean(dim=-1, keepdim=True), groups.mean(dim=-1, keepdim=True)
    off = levels - middle
    variance = off.square().sum(dim=-1, keepdim=True)
    slope = ((off * groups).sum(dim=-1, keepdim=True) / variance).nan_to_num(0.0)
    scale, lowest = slope.half(), (mean - slope * middle).half()
    values = torch.addcmul(lowest.float(), levels, scale.float()).view(weight.shape)
    return _int4_sets(levels, scale, lowest).flatten(), values


def int4_grid(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where ``weight`` [out, in] in fp32 lies on a 4-bit grid.

    Levels [out, groups, 32] of 0 to 15, both of which every group has, in fp32; scales and lowest
    values [out, groups, 1] in fp16. Raises PackError if it lies on none.
    """
    if weight.shape[1] % GROUP:
        raise PackError(f"groups have {GROUP} columns, the weight {weight.shape[1]}")
    groups = _groups(weight)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    levels, scale = _levels(groups, low, high, _LEVELS)
    _check_grid(levels * scale.float() + low.half().float(), groups, 4)
    return levels, scale, low.half()


def _sets(levels: Tensor, *scales: Tensor) -> Tensor:
    """Levels [out, groups, words, 4] and scales [out, groups, 1] in sets of 32 rows, as bytes."""
    missing = -levels.shape[0] % _SET
    return torch.cat(
        [
            F.pad(part.permute(1, 2, 0, 3), (0, 0, 0, missing))
            .unflatten(2, (-1, _SET))
            .movedim(2, 0)
            .flatten(2)
            .contiguous()
            .view(torch.uint8)
            for part in (*(scale.unsqueeze(-1) for scale in scales), levels)
        ],
        dim=2,
    )


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1).float()


def _check_grid(stored: Tensor, groups: Tensor, bits: int) -> None:
    if not ((stored - groups).abs() <= 1e-6 * groups.abs() + 1e-7).all():
        raise PackError(f"the weights do not lie on a {bits}-bit grid")
