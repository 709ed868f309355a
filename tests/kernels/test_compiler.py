"""The tests' own compiler of Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.compiler import CompileError, Compiler

TYPES = {"sums": "*fp32", "most": "*fp32", "total": "*fp32", "count": "*i32", "out": "*bf16"}
SIZES: dict[str, Any] = {"parts": 4, "dim": 80, "wide": 128}


def test_a_kernel_is_compiled_for_the_target_asked_for(compile_ahead: Compiler) -> None:
    made = compile_ahead("decode_attention", "_join", 90, TYPES, **SIZES)
    assert ".target sm_90" in made.ptx
    assert made.cubin_bytes > 0
    assert made.registers > 0


def test_a_kernel_that_cannot_be_compiled_is_noticed(compile_ahead: Compiler) -> None:
    with pytest.raises(CompileError, match="CompilationError"):
        compile_ahead("decode_attention", "_join", 90, TYPES | {"sums": "fp32"}, **SIZES)


def test_after_a_fault_the_next_kernel_is_compiled(compile_ahead: Compiler) -> None:
    with pytest.raises(CompileError, match="no attribute"):
        compile_ahead("decode_attention", "no_such_kernel", 90, TYPES, **SIZES)
    assert compile_ahead("decode_attention", "_join", 80, TYPES, **SIZES).spills == 0
