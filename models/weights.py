"""Choices of ``--weights``; apart from what carries them out, so that help needs no torch."""

from __future__ import annotations

from enum import StrEnum


class Weights(StrEnum):
    """Form of a model's matrices on a CPU."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT4 = "int4"
