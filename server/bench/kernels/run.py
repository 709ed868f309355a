"""One run of ``offramp bench kernels``: options, checks, ceilings, cases, tile sizes and report."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from offramp.kernels.backend import INTERPRETED, triton, uses_triton
from offramp.models.shapes import MODEL_SHAPES
from offramp.server.bench.common import Report, Say, UsageError, table, today
from offramp.server.bench.device import DTYPES, Ceilings, cpu_facts, measure_ceilings, processor
from offramp.server.bench.kernels import decoding, layers, products
from offramp.server.bench.kernels.case import (
    CASE_COLUMNS,
    Copies,
    Maker,
    Setup,
    Shape,
    check,
    measure_case,
)

OPS: Mapping[str, Maker] = MappingProxyType(
    {
        "rms_norm": layers.rms_norm_cases,
        "masked_rms_norm": layers.masked_rms_norm_cases,
        "add_rms_norm": layers.add_rms_norm_cases,
        "swiglu": layers.swiglu_cases,
        "linear": products.linear_cases,
        "masked_linear": products.masked_linear_cases,
        "rope_and_store": layers.rope_and_store_cases,
        "decode_attention": layers.decode_attention_cases,
        "prefill_attention": layers.prefill_attention_cases,
        "fill_kv": layers.fill_kv_cases,
        "embed_rows": decoding.embed_rows_cases,
        "gather_rows": decoding.gather_cases,
        "apply_gate": decoding.gate_cases,
        "apply_exit": decoding.exit_cases,
        "finish_rows": decoding.finish_cases,
        "score_logits": decoding.score_logits_cases,
        "sample_rows": decoding.sample_rows_cases,
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


def _runs(device: torch.device) -> str:
    """What an op's call runs on the device."""
    if not uses_triton(device):
        return "references"
    return "interpreted kernels" if INTERPRETED else "kernels"


def _shape(args: argparse.Namespace) -> tuple[str, Shape]:
    """The model's name and sizes, with defaults by device; UsageError for unknown names."""
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
    return name, Shape(MODEL_SHAPES[name], dtype, device, args.context)


@torch.inference_mode()
def bench(args: argparse.Namespace, command: str, say: Say) -> Report:
    """Check all ops, then time them; raises Refused if one computes something else."""
    name, shape = _shape(args)
    # In the table's order: what others are checked with is checked first.
    ops = [op for op in OPS if not args.ops or op in args.ops]
    for op in ops:
        say(f"checking {op}")
        for rows in args.rows:
            check(op, OPS[op], shape, rows)
    say("measuring the ceilings")
    ceilings = measure_ceilings(shape.device, shape.dtype, args.seconds)
    make_setup = partial(Setup, shape, _COPIES[shape.device.type])
    cases: Rows = []
    skipped: Rows = []
    for op, rows in itertools.product(ops, args.rows):
        say(f"timing {op}, rows: {rows}")
        try:
            setup = make_setup()
            cases.extend(
                measure_case(setup, case, ceilings, args.seconds)
                for case in OPS[op](setup, rows, rows)
            )
        except torch.OutOfMemoryError as error:
            why = str(error).partition("\n")[0]
            skipped.append({"op": op, "rows": rows, "why": why})
    document: dict[str, Any] = {
        "command": command,
        "date": today(),
        "device": _device(shape.device),
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "runs": _runs(shape.device),
        "model_shape": name,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "context": shape.context,
        "seconds": args.seconds,
        "ceilings": {key: round(value) for key, value in asdict(ceilings).items()},
        "cases": cases,
        "skipped": skipped,
    }
    if args.tiles:
        document["tiles"] = [
            row
            for rows in args.rows
            for row in products.compare_tiles(make_setup, rows, args.seconds, say)
        ]
    tables = _tables(ceilings, document)
    return Report(f"{tables}\n", document, _page(document, tables))


def _tables(ceilings: Ceilings, document: Mapping[str, Any]) -> str:
    """Markdown, with what its columns mean."""
    parts = []
    if document["runs"] in _REHEARSAL:
        parts.append(f"**{_REHEARSAL[document['runs']]}**\n")
    parts.append(
        f"Ceilings measured: a copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, a sum "
        f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, products "
        f"{ceilings.flops_per_s / 1e12:.2f} TFLOP/s.\n"
    )
    if document["device"]["type"] == "cuda":
        parts.append(_CACHES)
    parts.append(table(document["cases"], CASE_COLUMNS) + "\n")
    if "tiles" in document:
        parts.append("Cuts (rows x outputs x inputs, warps, stages):\n")
        parts.append(table(document["tiles"], products.TILES_COLUMNS) + "\n")
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
