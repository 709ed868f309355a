"""``offramp bench``: modes side by side in one run, with quality and executed layers beside speed.

Rounds interleave the modes (off, adaptive, off, adaptive, ...), so a machine whose speed drifts
drifts for both. Nothing is reported unless mode ``off`` gives transformers' own tokens. The last
line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.models.transformer import Transformer
    from offramp.server.bench.load import Target, Trace
    from offramp.server.bench.reference import Reference
    from offramp.server.bench.report import Round
    from offramp.server.engine.engine import Engine


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; status 1 if it refuses to report."""
    args = _parser().parse_args(argv)
    # Imported here so that --help needs neither torch nor transformers.
    from offramp.models.errors import ModelError  # noqa: PLC0415
    from offramp.server.bench.load import LoadError  # noqa: PLC0415
    from offramp.server.bench.prompts import PromptFileError  # noqa: PLC0415
    from offramp.server.engine.build import EngineConfigError  # noqa: PLC0415

    try:
        return _bench(args)
    except (ModelError, PromptFileError, EngineConfigError, LoadError) as error:
        sys.stderr.write(f"offramp bench: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="offramp bench", allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, folder or hub id")
    parser.add_argument("--url", help="measure the server there; in this process if unset")
    parser.add_argument("--api-key", help="key of that server")
    parser.add_argument("--prompts", type=Path, help="prompt file; a built-in set if unset")
    parser.add_argument("--concurrency", type=_numbers, default=(1, 4, 16), help="[1,4,16]")
    parser.add_argument("--modes", type=_words, default=("off", "adaptive"), help="[off,adaptive]")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens an answer [64]")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds [3]")
    parser.add_argument("--requests", type=int, help="answers a round [2 a stream, at least 4]")
    parser.add_argument("--exits", default="auto", help='exit file, "auto" or "none"')
    parser.add_argument("--exit-threshold", type=float, help="score instead of the calibrated one")
    parser.add_argument("--exit-quality", type=float, help="agreement promised [0.98 if reached]")
    parser.add_argument(
        "--kv-fill",
        choices=("auto", "project", "copy", "recompute"),
        default="project",
        help="how K,V of skipped layers are made [project]",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is torch's choice")
    parser.add_argument("--reference-prompts", type=int, default=4, help="checked answers [4]")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return numbers


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if not set(words) <= {"off", "adaptive", "lossless"}:
        raise argparse.ArgumentTypeError("modes are: off, adaptive, lossless")
    return words


def _bench(args: argparse.Namespace) -> int:
    from offramp.models.sources import resolve  # noqa: PLC0415
    from offramp.server.bench.reference import transformers_answers  # noqa: PLC0415

    folder = resolve(args.model)
    engine = _engine(args, folder)
    target = _target(args, engine)
    prompts = _prompts(args, folder)
    _say("reference: transformers generate, fp32, one stream")
    checked = prompts[: args.reference_prompts]
    reference = transformers_answers(folder, checked, args.max_tokens)
    wrong = _differences(target, checked, reference, args)
    if wrong:
        _say(f"refused: mode off differs from transformers on {wrong} of {len(checked)} prompts")
        return 1
    rows = _measure(args, target, prompts, _model(engine))
    _print(args, engine, reference, rows)
    return 0


def _engine(args: argparse.Namespace, folder: Path) -> Engine:
    """The engine to measure, or, against a server, the model that judges its answers."""
    from offramp.server.config import EngineConfig  # noqa: PLC0415
    from offramp.server.engine.build import build_engine  # noqa: PLC0415

    config = EngineConfig(
        max_num_seqs=max(args.concurrency),
        max_model_len=2048,
        exits="none" if args.url else args.exits,
        exit_quality=None if args.url else args.exit_quality,
        exit_audit_rate=0.0,
        threads=args.threads,
        dtype="float32",
        enable_prefix_caching=False,
    )
    return build_engine(config, folder, model_name=args.model)


def _target(args: argparse.Namespace, engine: Engine) -> Target:
    from offramp.server.bench.load import InProcess, OverHTTP  # noqa: PLC0415

    if args.url:
        wishes = {"threshold": args.exit_threshold, "quality": args.exit_quality}
        given = {name: value for name, value in wishes.items() if value is not None}
        return OverHTTP(args.url, args.model, args.api_key, {**given, "kv_fill": args.kv_fill})
    return InProcess(engine, args.exit_threshold, args.kv_fill)


def _model(engine: Engine) -> Transformer:
    from offramp.models.runner import Runner  # noqa: PLC0415

    runner = engine.runner
    assert isinstance(runner, Runner)
    return runner.model


def _prompts(args: argparse.Namespace, folder: Path) -> list[tuple[int, ...]]:
    from offramp.server.bench.prompts import BUILT_IN, read_prompts  # noqa: PLC0415
    from offramp.server.text.tokenizer import Tokenizer  # noqa: PLC0415

    texts = read_prompts(args.prompts) if args.prompts else list(BUILT_IN)
    tokenizer = Tokenizer.load(folder)
    ids = [tokenizer.encode_chat([{"role": "user", "content": t}], 10**6) for t in texts]
    return [prompt for prompt in ids if len(prompt) + args.max_tokens <= 2048]


def _differences(
    target: Target, prompts: list[tuple[int, ...]], reference: Reference, args: argparse.Namespace
) -> int:
    """Prompts whose answers differ from the reference, alone or in company."""
    wrong = set()
    for concurrency in (1, max(args.concurrency)):
        traces = target.run(
            prompts, mode="off", concurrency=concurrency, max_tokens=args.max_tokens
        )
        wrong |= {
            i
            for i, (trace, answer) in enumerate(zip(traces, reference.answers, strict=True))
            if trace.token_ids != answer
        }
    return len(wrong)


def _measure(
    args: argparse.Namespace, target: Target, prompts: list[tuple[int, ...]], judge: Transformer
) -> list[dict[str, Any]]:
    from offramp.server.bench.report import measure  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    for concurrency in args.concurrency:
        count = args.requests or max(4, 2 * concurrency)
        rounds: dict[str, list[Round]] = {mode: [] for mode in args.modes}
        kept: dict[str, list[Trace]] = {mode: [] for mode in args.modes}
        # Round 0 warms up; each later one takes other prompts, the same for every mode.
        for number in range(args.rounds + 1):
            batch = [prompts[(number * count + i) % len(prompts)] for i in range(count)]
            if args.url:
                # A server keeps prompts it has seen; a first pass gives every mode the same hits.
                target.run(batch, mode="off", concurrency=concurrency, max_tokens=1)
            for mode in args.modes if number % 2 else reversed(args.modes):
                _say(f"{concurrency} streams, round {number}, {mode}")
                traces = target.run(
                    batch, mode=mode, concurrency=concurrency, max_tokens=args.max_tokens
                )
                if number:
                    rounds[mode].append(measure(traces))
                    kept[mode] += traces
        rows += _rows(concurrency, rounds, kept, judge)
    return rows


def _rows(
    concurrency: int,
    rounds: dict[str, list[Round]],
    kept: dict[str, list[Trace]],
    judge: Transformer,
) -> list[dict[str, Any]]:
    import statistics  # noqa: PLC0415

    from offramp.server.bench.reference import agreement  # noqa: PLC0415
    from offramp.server.bench.report import exit_efficiency, summarise  # noqa: PLC0415

    rows = []
    for mode, measured in rounds.items():
        row = {"mode": mode, "concurrency": concurrency, **summarise(measured)}
        row["agreement"] = round(agreement(judge, kept[mode]), 4)
        if "off" in rounds and mode != "off":
            pairs = zip(measured, rounds["off"], strict=True)
            row["speed_up"] = round(
                statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs), 4
            )
            row["exit_efficiency"] = exit_efficiency(
                row["speed_up"], judge.config.num_layers, row["mean_depth"]
            )
            row["same_answers_as_off"] = sum(
                a.token_ids == b.token_ids for a, b in zip(kept[mode], kept["off"], strict=True)
            ) / len(kept[mode])
        rows.append(row)
    return rows


def _print(
    args: argparse.Namespace, engine: Engine, reference: Reference, rows: list[dict[str, Any]]
) -> None:
    import torch  # noqa: PLC0415

    from offramp.server.bench.report import table  # noqa: PLC0415

    off = {row["concurrency"]: row["tokens_per_s"] for row in rows if row["mode"] == "off"}
    ratios: dict[str, float] = {}
    if 1 in off:
        ratios["off_1_to_transformers"] = round(off[1] / reference.tokens_per_s, 3)
        ratios |= {f"off_{n}_to_off_1": round(v / off[1], 3) for n, v in off.items() if n != 1}
    document = {
        "command": "offramp bench " + " ".join(sys.argv[2:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "simd": torch.backends.cpu.get_cpu_capability(),
            "load_average": os.getloadavg()[0],
        },
        "model": args.model,
        "target": args.url or "in process",
        "dtype": engine.info.dtype,
        "exit_layers": engine.info.exit_layers,
        "exit_thresholds": engine.info.exit_thresholds,
        "exit_threshold": args.exit_threshold,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "transformers_tokens_per_s": round(reference.tokens_per_s, 3),
        "ratios": ratios,
        "rows": rows,
    }
    sys.stdout.write(table(rows) + "\n\n")
    sys.stdout.write(f"transformers generate, 1 stream: {reference.tokens_per_s:.1f} tokens/s\n")
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in ratios.items()))
    sys.stdout.write(json.dumps(document) + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
