"""The report: tables for people, then one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from offramp.server.bench import profile
from offramp.server.bench.ratios import ratio_table, ratios
from offramp.server.bench.reference import Reference
from offramp.server.bench.report import table
from offramp.server.bench.rounds import Result
from offramp.server.bench.sides import serves


@dataclass(frozen=True, slots=True)
class Report:
    """All that a run found; ``sides`` are Offramp's facts and, if there is one, its peer's."""

    args: argparse.Namespace
    reference: Reference
    check: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    results: Sequence[Result]
    sides: Sequence[dict[str, Any]]
    quiet: dict[str, Any]
    long_prompt: dict[str, Any] | None
    profile: dict[str, Any] | None

    def text(self) -> str:
        """Tables and ratios, the last line JSON."""
        speed = self.reference.tokens_per_s
        parts = [table(self.rows) + "\n\n"]
        against = ratios(self.results)
        if against:
            parts.append(ratio_table(against) + "\n\n")
        parts.append(f"transformers generate, 1 stream: {speed:.1f} tokens/s\n")
        parts += [f"{name}: {value}\n" for name, value in self._ratios().items()]
        if self.long_prompt is not None:
            parts.append(_long_text(self.long_prompt))
        if self.profile is not None:
            parts.append(profile.text(self.profile))
        parts.append(json.dumps({**self._document(), "peer_ratios": against}) + "\n")
        return "".join(parts)

    def _ratios(self) -> dict[str, float]:
        off = {row["concurrency"]: row["tokens_per_s"] for row in self.rows if row["mode"] == "off"}
        if 1 not in off:
            return {}
        found = {"off_1_to_transformers": round(off[1] / self.reference.tokens_per_s, 3)}
        return found | {f"off_{n}_to_off_1": round(v / off[1], 3) for n, v in off.items() if n != 1}

    def _document(self) -> dict[str, Any]:
        args, ours = self.args, self.sides[0]
        return {
            "command": "offramp bench " + " ".join(sys.argv[2:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(),
            **self.quiet,
            "model": args.model,
            "target": args.url or ("server process" if serves(args) else "in process"),
            "dtype": ours.get("dtype"),
            "exit_layers": ours.get("exit_layers"),
            "exit_thresholds": ours.get("exit_thresholds"),
            "exit_threshold": args.exit_threshold,
            "max_tokens": args.max_tokens,
            "rounds": args.rounds,
            "check": self.check,
            "offramp": ours,
            "peer": self.sides[1] if len(self.sides) > 1 else None,
            "transformers_tokens_per_s": round(self.reference.tokens_per_s, 3),
            "ratios": self._ratios(),
            "rows": self.rows,
            "long_prompt": self.long_prompt,
            "profile": self.profile,
        }


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }


def _long_text(found: dict[str, Any]) -> str:
    lines = []
    for case in ("new", "seen"):
        times = ", ".join(
            f"{name} {'-' if value is None else f'{value:.0f} ms'}"
            for name, value in found[f"{case}_ttft_ms"].items()
        )
        ratio = found["ratios"][case]
        told = f"; ratio {ratio['median']} ({ratio['min']} to {ratio['max']})" if ratio else ""
        lines.append(f"first token of {found['tokens']} prompt tokens, {case}: {times}{told}\n")
    return "".join(lines)
