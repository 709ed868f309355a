"""Wheels for a platform carry the C kernels compiled for its instruction sets.

With OFFRAMP_PREBUILT=1 in the environment a wheel is such a one, for the platform it is built on
(x86-64 or aarch64), and needs no compiler where it is installed; without, it is pure Python and
compiles at the first start.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PrebuiltKernels(BuildHookInterface[Any]):
    """Compiles every variant into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See BuildHookInterface; raises RuntimeError where they cannot be compiled."""
        if version == "editable" or os.environ.get("OFFRAMP_PREBUILT") != "1":
            return
        sys.path.insert(0, self.root)
        from offramp.kernels.native_build import (  # noqa: PLC0415
            ARCHITECTURE,
            VARIANTS,
            compiled,
            find_compiler,
        )

        if not VARIANTS:
            raise RuntimeError(f"OFFRAMP_PREBUILT=1: there are no variants for {ARCHITECTURE}")
        compiler = find_compiler()
        if compiler is None:
            raise RuntimeError("OFFRAMP_PREBUILT=1 needs a C compiler (CC, cc, gcc, clang)")
        self._scratch = tempfile.TemporaryDirectory()
        for variant in VARIANTS:
            made = compiled(compiler, Path(self._scratch.name), variant)
            build_data["force_include"][str(made)] = f"offramp/kernels/prebuilt/{variant.name}.so"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """See BuildHookInterface."""
        del version, build_data, artifact_path
        scratch = getattr(self, "_scratch", None)
        if scratch is not None:
            scratch.cleanup()
