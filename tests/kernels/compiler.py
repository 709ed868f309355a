"""Compile Triton kernels for GPUs that are not here.

A process of its own, because under the interpreter's variable kernels are no kernels. Run as a
program it answers a line of JSON with a line of JSON; `Compiler` is the other end. What all of it
takes of a GPU is written to the file that KERNEL_REPORT names.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TARGETS = (80, 90)
# What a block of threads can have on an A100 and on an H100 or H200.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}


class CompileError(Exception):
    """The kernel does not compile; the message is the compiler's."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as it came out of the compiler; ``spills`` are bytes a thread keeps in memory."""

    ptx: str
    cubin_bytes: int
    shared_bytes: int
    registers: int
    spills: int

    @property
    def on_tensor_cores(self) -> bool:
        """Whether products are left to the matrix units."""
        return "mma.sync" in self.ptx or "wgmma.mma_async" in self.ptx

    @property
    def fetches_ahead(self) -> bool:
        """Whether loads go to shared memory in pieces of 16 bytes while others are worked on."""
        return "cp.async.cg.shared.global" in self.ptx


class Compiler:
    """The compiling process; start it once, it takes seconds."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._made: dict[tuple[str, str, int], list[Compiled]] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        if path := os.environ.get("KERNEL_REPORT"):
            Path(path).write_text(self._report(), encoding="utf-8")

    def __call__(
        self,
        module: str,
        kernel: str,
        target: int,
        signature: dict[str, str],
        *,
        warps: int = 4,
        stages: int = 3,
        divisible: Collection[str] = (),
        **constants: Any,
    ) -> Compiled:
        """``module`` below offramp.kernels; a constant that is a text names a type of Triton's.

        ``divisible`` names numbers that are multiples of 16, as Triton finds out when it launches;
        pointers are. Without them loads are narrow, and nothing is fetched ahead.
        """
        spec = {"module": module, "kernel": kernel, "target": target, "signature": signature}
        aligned = {name for name, kind in signature.items() if kind.startswith("*")}
        spec["divisible"] = sorted(aligned | set(divisible))
        spec |= {"constants": constants, "options": {"num_warps": warps, "num_stages": stages}}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(spec) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise CompileError(answer["error"])
        made = Compiled(**answer)
        self._made.setdefault((module, kernel, target), []).append(made)
        return made

    def _report(self) -> str:
        """A table with a line for each kernel and target."""
        head = "| kernel | target | variants | most shared KiB | most registers | spilled bytes |"
        lines = [head, "|---|---|---|---|---|---|"]
        for (module, kernel, target), made in sorted(self._made.items()):
            shared = max(each.shared_bytes for each in made) / 1024
            registers = max(each.registers for each in made)
            spills = max(each.spills for each in made)
            name = f"`{module}.{kernel.removeprefix('_')}`"
            row = (name, f"sm_{target}", len(made), f"{shared:.0f}", registers, spills)
            lines.append("| " + " | ".join(map(str, row)) + " |")
        return "\n".join(lines) + "\n"


def _compile(spec: dict[str, Any]) -> dict[str, Any]:
    import triton  # noqa: PLC0415
    import triton.language as tl  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    kernel = getattr(importlib.import_module(f"offramp.kernels.{spec['module']}"), spec["kernel"])
    constants = {
        name: getattr(tl, value) if isinstance(value, str) and hasattr(tl, value) else value
        for name, value in spec["constants"].items()
    }
    signature = spec["signature"] | dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in spec["divisible"]
    }
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", spec["target"], 32)
    made = triton.compile(source, target=target, options=spec["options"])
    return {
        "ptx": made.asm["ptx"],
        "cubin_bytes": len(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        **_usage(made.asm["ptx"]),
    }


def _usage(ptx: str) -> dict[str, int]:
    """Registers and spills, as the assembler tells them."""
    from triton import knobs  # noqa: PLC0415

    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [
                knobs.nvidia.ptxas.path,
                "-v",
                f"--gpu-name={architecture[1]}",
                "-o",
                os.devnull,
                file.name,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers is not None, done.stderr
    return {"registers": int(registers[1]), "spills": int(spills[1]) if spills else 0}


def main() -> None:
    """Answer lines of standard input until it ends."""
    for line in sys.stdin:
        try:
            answer = _compile(json.loads(line))
        except Exception as error:  # noqa: BLE001 (whatever it is, the test is told)
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
