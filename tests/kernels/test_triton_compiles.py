"""Every Triton kernel compiles for GPUs that are not here: ahead of time, in another process.

A process of its own, because under the interpreter's variable kernels are no kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no triton")

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
SCRIPT = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton, triton.language as tl
from offramp.kernels import row_attention
spec = json.loads(sys.argv[1])
constants = {n: getattr(tl, v) if isinstance(v, str) else v for n, v in spec["constants"].items()}
signature = spec["signature"] | dict.fromkeys(constants, "constexpr")
source = ASTSource(getattr(row_attention, spec["kernel"]), signature, constants)
made = triton.compile(source, target=GPUTarget("cuda", spec["target"], 32))
found = {"shared": made.metadata.shared, "ptx": made.asm["ptx"], "cubin": len(made.asm["cubin"])}
print(json.dumps(found))
"""


def compiled(kernel: str, target: int, signature: dict[str, str], **constants: Any) -> Any:
    spec = {"kernel": kernel, "target": target, "signature": signature, "constants": constants}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(spec)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", SHARED_BYTES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("group", "dim"), [(3, 64), (8, 128)], ids=["small", "large"])
def test_attention_compiles(target: int, dtype: str, group: int, dim: int) -> None:
    types = dict.fromkeys(["q", "k", "v"], f"*{dtype}")
    types |= dict.fromkeys(["positions", "first_blocks", "blocks"], "*i64")
    types |= dict.fromkeys(["sums", "most", "total"], "*fp32")
    types |= {"scale": "fp32", "window": "i32"}
    types |= dict.fromkeys(["q_row", "q_head", "kv_place", "kv_head"], "i32")
    compute = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    sizes = {"parts": 4, "block_size": 32, "group": group, "rows_of_product": 16}
    sizes |= {"dim": dim, "wide": dim, "tile": 32}
    made = compiled("_attend", target, types, **sizes, compute=compute)
    assert made["shared"] <= SHARED_BYTES[target]
    assert f".target sm_{target}" in made["ptx"]
    assert made["cubin"] > 0


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_joining_parts_compiles(target: int) -> None:
    types = {"sums": "*fp32", "most": "*fp32", "total": "*fp32", "out": "*bf16"}
    made = compiled("_join", target, types, parts=4, dim=80, wide=128)
    assert f".target sm_{target}" in made["ptx"]


def test_a_kernel_that_cannot_be_compiled_is_noticed() -> None:
    with pytest.raises(AssertionError, match="CompilationError"):
        compiled(
            "_join",
            90,
            {"sums": "fp32", "most": "*fp32", "total": "*fp32", "out": "*bf16"},
            parts=4,
            dim=80,
            wide=128,
        )
