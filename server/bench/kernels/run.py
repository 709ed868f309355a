"""One run of ``offramp bench kernels``: options, checks, ceilings, cases, tile sizes and report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch

from offramp.kernels.backend import INTERPRETED, triton, uses_triton
from offramp.models.shapes import MODEL_SHAPES
from offramp.server.bench.common import Report, Say, UsageError, table, today
from offramp.server.bench.device import DTYPES, Ceilings, cpu_facts, measure_ceilings, processor
from offramp.server.bench.kernels.case import (
    CASE_COLUMNS,
    Copies,
    Maker,
    Setup,
    Shape,
    check,
    measure_case,
)
from offramp.server.bench.kernels.decoding import (
    embed_rows_cases,
    exit_cases,
    finish_cases,
    gate_cases,
    gather_cases,
    sample_rows_cases,
    score_logits_cases,
)
from offramp.server.bench.kernels.layers import (
    add_rms_norm_cases,
    decode_attention_cases,
    fill_kv_cases,
    prefill_attention_cases,
    rms_norm_cases,
    rope_and_store_cases,
    swiglu_cases,
)
from offramp.server.bench.kernels.products import (
    TILES_COLUMNS,
    compare_tiles,
    linear_cases,
    masked_linear_cases,
)

OPS: Mapping[str, Maker] = MappingProxyType(
    {
        "rms_norm": rms_norm_cases,
        "add_rms_norm": add_rms_norm_cases,
        "swiglu": swiglu_cases,
        "linear": linear_cases,
        "masked_linear": masked_linear_cases,
        "rope_and_store": rope_and_store_cases,
        "decode_attention": decode_attention_cases,
        "prefill_attention": prefill_attention_cases,
        "fill_kv": fill_kv_cases,
        "embed_rows": embed_rows_cases,
        "board": gather_cases,
        "fire": gate_cases,
        "leave": exit_cases,
        "arrive": finish_cases,
        "score_logits": score_logits_cases,
        "sample_rows": sample_rows_cases,
    }
)
"""All ops that are measured, by name; those that others are checked with come first."""

# Five times the L2 cache of an H100 or H200; on a CPU enough to rehearse that there are several.
_COPIES = {"cuda": Copies(256 << 20, 512), "cpu": Copies(1 << 20, 2)}
_REHEARSAL = {
    "references": "A rehearsal: no kernel ran, the figures are those of plain operators.",
    "interpreted kernels": "A rehearsal: kernels ran in Triton's interpreter, times mean nothing.",
}
_CACHES = (
    "Weights, keys and values, logits and embeddings are read from memory; ops on activations find "
    "theirs in the cache, as in a model, so their share may exceed 1.\n"
)

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Options:
    """A model's ``shape`` by its ``name``; ``ops`` with each number of ``rows``.

    Each timing takes ``seconds``; with ``tiles`` products are also timed with other tile sizes.
    """

    name: str
    shape: Shape
    ops: tuple[str, ...]
    rows: tuple[int, ...]
    seconds: float
    tiles: bool

    def setup(self) -> Setup:
        """Inputs for timing."""
        return Setup(self.shape, _COPIES[self.shape.device.type])

    @property
    def runs(self) -> str:
        """What an op's call runs on the device."""
        if not uses_triton(self.shape.device):
            return "references"
        return "interpreted kernels" if INTERPRETED else "kernels"


def read_options(args: argparse.Namespace) -> Options:
    """What the command line says, with defaults by device; UsageError for unknown names."""
    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise UsageError("--device cuda: torch finds no CUDA device")
    on_gpu = there and args.device != "cpu"
    name = args.model_shape or ("llama-3-8b" if on_gpu else "tiny")
    if name not in MODEL_SHAPES:
        raise UsageError(f"--model-shape {name}: shapes are {', '.join(MODEL_SHAPES)}")
    unknown = [op for op in args.ops if op not in OPS]
    if unknown:
        raise UsageError(f"--ops {','.join(unknown)}: ops are {', '.join(OPS)}")
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    device = torch.device("cuda" if on_gpu else "cpu")
    # In the table's order: what others are checked with is checked first.
    ops = tuple(op for op in OPS if not args.ops or op in args.ops)
    shape = Shape(MODEL_SHAPES[name], dtype, device, args.context)
    return Options(name, shape, ops, args.rows, args.seconds, args.tiles)


@torch.inference_mode()
def bench(args: argparse.Namespace, command: str, say: Say) -> Report:
    """Check all ops, then time them; raises Refused if one computes something else."""
    options = read_options(args)
    shape = options.shape
    for name in options.ops:
        say(f"checking {name}")
        for rows in options.rows:
            check(name, OPS[name], shape, rows)
    say("measuring the ceilings")
    ceilings = measure_ceilings(shape.device, shape.dtype, options.seconds)
    cases, skipped = _cases(options, ceilings, say)
    tiles: Rows = []
    for rows in options.rows if options.tiles else ():
        tiles += compare_tiles(options.setup, rows, options.seconds, say)
    document: dict[str, Any] = {
        "command": command,
        "date": today(),
        "device": _device(shape.device),
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "runs": options.runs,
        "model_shape": options.name,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "context": shape.context,
        "seconds": options.seconds,
        "ceilings": {name: round(value) for name, value in asdict(ceilings).items()},
        "cases": cases,
        "skipped": skipped,
    }
    if options.tiles:
        document["tiles"] = tiles
    tables = _tables(options, ceilings, document)
    return Report(f"{tables}\n", document, _page(document, tables))


def _cases(options: Options, ceilings: Ceilings, say: Say) -> tuple[Rows, Rows]:
    """Figures of all cases, and those that there is no memory for."""
    found: Rows = []
    skipped: Rows = []
    for name in options.ops:
        for rows in options.rows:
            say(f"timing {name}, rows: {rows}")
            try:
                setup = options.setup()
                found.extend(
                    measure_case(setup, case, ceilings, options.seconds)
                    for case in OPS[name](setup, rows, rows)
                )
            except torch.OutOfMemoryError as error:
                why = str(error).partition("\n")[0]
                skipped.append({"op": name, "rows": rows, "why": why})
    return found, skipped


def _tables(options: Options, ceilings: Ceilings, document: Mapping[str, Any]) -> str:
    """Markdown, with what its columns mean."""
    parts = []
    if options.runs in _REHEARSAL:
        parts.append(f"**{_REHEARSAL[options.runs]}**\n")
    parts.append(
        f"Ceilings measured: a copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, a sum "
        f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, products "
        f"{ceilings.flops_per_s / 1e12:.2f} TFLOP/s.\n"
    )
    if options.shape.device.type == "cuda":
        parts.append(_CACHES)
    parts.append(table(document["cases"], CASE_COLUMNS) + "\n")
    if options.tiles:
        parts.append("Cuts (rows x outputs x inputs, warps, stages):\n")
        parts.append(table(document["tiles"], TILES_COLUMNS) + "\n")
    parts += _skipped(document["skipped"], document.get("tiles", ()))
    return "\n".join(parts)


def _skipped(cases: Sequence[Mapping[str, Any]], tiles: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each case and each tile size that was left out, with the reason."""
    lines = [f"Skipped: {each['op']}, {each['rows']} rows: {each['why']}\n" for each in cases]
    for row in tiles:
        what = f"{row['what']}, {row['rows']} rows"
        lines += [f"Skipped: {what}, {each['cut']}: {each['why']}\n" for each in row["skipped"]]
    return lines


def _page(document: Mapping[str, Any], tables: str) -> str:
    """The tables below date, device and command."""
    versions = f"torch {document['torch']}"
    if document["triton"]:
        versions += f", triton {document['triton']}"
    return (
        f"# Kernels of {document['model_shape']} in {document['dtype']}\n\n"
        f"{document['date']}, {document['device']['name']}, {versions}:\n\n"
        f"```console\n{document['command']}\n```\n\n{tables}"
    )


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
    return {"type": device.type, "name": processor(), **cpu_facts()}
