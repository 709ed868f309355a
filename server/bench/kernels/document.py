"""The report: tables for people, also as a Markdown file, and one line of JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from offramp.kernels.backend import triton
from offramp.server.bench.kernels import cuts, roofline
from offramp.server.bench.kernels.ceilings import Ceilings
from offramp.server.bench.kernels.plan import Plan
from offramp.server.bench.report import table

_REHEARSAL = {
    "references": "A rehearsal: no kernel ran, the figures are those of plain operators.",
    "interpreted kernels": "A rehearsal: kernels ran in Triton's interpreter, times mean nothing.",
}
_CACHES = (
    "Weights, keys and values, logits and embeddings are read from memory; ops on activations find "
    "theirs in the cache, as in a model, so their share may exceed 1.\n"
)


@dataclass(frozen=True, slots=True)
class Report:
    """All that a run found; ``skipped`` are cases that the device had no memory for."""

    command: str
    plan: Plan
    ceilings: Ceilings
    cases: Sequence[dict[str, Any]]
    tiles: Sequence[dict[str, Any]] | None
    skipped: Sequence[dict[str, Any]]

    def text(self) -> str:
        """Tables, the last line JSON."""
        return f"{self._tables()}\n{json.dumps(self.document())}\n"

    def markdown(self) -> str:
        """Tables below date, device and command."""
        document = self.document()
        device, versions = document["device"], f"torch {document['torch']}"
        if document["triton"]:
            versions += f", triton {document['triton']}"
        return (
            f"# Kernels of {self.plan.name} in {document['dtype']}\n\n"
            f"{document['date']}, {device['name']}, {versions}:\n\n"
            f"```console\n{self.command}\n```\n\n{self._tables()}"
        )

    def document(self) -> dict[str, Any]:
        """What the line of JSON says."""
        shape = self.plan.shape
        found: dict[str, Any] = {
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": _device(shape.device),
            "torch": torch.__version__,
            "triton": None if triton is None else triton.__version__,
            "runs": self.plan.runs,
            "model_shape": self.plan.name,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "context": shape.context,
            "seconds": self.plan.seconds,
            "ceilings": {k: round(v) for k, v in asdict(self.ceilings).items()},
            "cases": list(self.cases),
            "skipped": list(self.skipped),
        }
        return found if self.tiles is None else {**found, "tiles": list(self.tiles)}

    def _tables(self) -> str:
        ceilings = self.ceilings
        parts = []
        if self.plan.runs in _REHEARSAL:
            parts.append(f"**{_REHEARSAL[self.plan.runs]}**\n")
        parts.append(
            f"Ceilings measured: a copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, a sum "
            f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, products "
            f"{ceilings.flops_per_s / 1e12:.2f} TFLOP/s.\n"
        )
        if self.plan.shape.device.type == "cuda":
            parts.append(_CACHES)
        parts.append(table(self.cases, roofline.COLUMNS) + "\n")
        if self.tiles is not None:
            parts.append("Cuts (rows x outputs x inputs, warps, stages):\n")
            parts.append(table(self.tiles, cuts.COLUMNS) + "\n")
        parts += [f"Skipped: {each['what']}: {each['why']}\n" for each in self._all_skipped()]
        return "\n".join(parts)

    def _all_skipped(self) -> list[dict[str, Any]]:
        """Cases and cuts, each with what it was."""
        skipped = [
            {"what": f"{each['op']}, {each['rows']} rows", "why": each["why"]}
            for each in self.skipped
        ]
        for row in self.tiles or ():
            skipped += [
                {"what": f"{row['what']}, {row['rows']} rows, {each['cut']}", "why": each["why"]}
                for each in row["skipped"]
            ]
        return skipped


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return {
        "type": device.type,
        "name": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
    }
