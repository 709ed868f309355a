"""One run of ``offramp bench``, from the model to the report."""

from __future__ import annotations

import argparse
import gc
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from offramp.models.loading.sources import resolve
from offramp.server.bench import reference
from offramp.server.bench.common import BenchError, Report, Say, table, today
from offramp.server.bench.device import machine_facts
from offramp.server.bench.profile import draw, profile, profile_text, require_matplotlib
from offramp.server.bench.quiet import Watch
from offramp.server.bench.rounds import (
    LONG_PROMPT_ANSWER,
    RATIO_COLUMNS,
    ROW_COLUMNS,
    Entry,
    Plan,
    Result,
    long_prompt,
    long_prompt_text,
    measure_long,
    ratios,
    rows,
    run_rounds,
)
from offramp.server.bench.systems import Capacity, System, engine_config, offramp, peer, serves
from offramp.server.bench.targets import Prompt
from offramp.server.engine.build import build_engine
from offramp.server.text.prompts import BUILT_IN, read_prompts
from offramp.server.text.tokenizer import Tokenizer

_CONTEXT = 2048
_BLOCK = 256


def bench(args: argparse.Namespace, command: str, say: Say) -> Report:
    """Measure, and make the report.

    Raises BenchError, Refused, and what loading models, prompts and engines raises.
    """
    run = _Run(args, say)
    checked, results, systems = run.rounds()
    long = run.long_prompt() if args.long_prompt else None
    profiled = run.profile() if args.profile else None
    run.watch.look("at the end")
    say("judging the answers")
    without = run.judge.config.eos_token_ids if args.peer else ()
    found = rows(results, run.judge, without, greedy=not args.temperature)
    own_ratios, against = _ratios(found, run.reference.tokens_per_s), ratios(results)
    parts = [table(found, ROW_COLUMNS) + "\n\n"]
    if against:
        parts.append(table(against, RATIO_COLUMNS) + "\n\n")
    parts.append(f"transformers generate, 1 stream: {run.reference.tokens_per_s:.1f} tokens/s\n")
    parts += [f"{name}: {value}\n" for name, value in own_ratios.items()]
    if long is not None:
        parts.append(long_prompt_text(long))
    if profiled is not None:
        parts.append(profile_text(profiled))
    ours, lengths = systems[0], list(map(len, run.prompts))
    document = {
        "command": command,
        "date": today(),
        "machine": machine_facts(),
        **run.watch.document(),
        "model": args.model,
        "target": args.url or ("server process" if serves(args) else "in process"),
        "dtype": ours.get("dtype"),
        "exit_layers": ours.get("exit_layers"),
        "exit_thresholds": ours.get("exit_thresholds"),
        "exit_threshold": args.exit_threshold,
        "prompt_tokens": {"min": min(lengths), "max": max(lengths)},
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "rounds": args.rounds,
        "check": asdict(checked),
        "offramp": ours,
        "peer": systems[1] if len(systems) > 1 else None,
        "transformers_tokens_per_s": round(run.reference.tokens_per_s, 3),
        "ratios": own_ratios,
        "rows": found,
        "long_prompt": long,
        "profile": profiled,
        "peer_ratios": against,
    }
    return Report("".join(parts), document)


def _ratios(found: list[dict[str, Any]], transformers_speed: float) -> dict[str, float]:
    """Throughput of mode off: one stream to transformers', more streams to one."""
    off = {row["concurrency"]: row["tokens_per_s"] for row in found if row["mode"] == "off"}
    if 1 not in off:
        return {}
    made = {"off_1_to_transformers": round(off[1] / transformers_speed, 3)}
    return made | {f"off_{n}_to_off_1": round(v / off[1], 3) for n, v in off.items() if n != 1}


class _Run:
    """What the parts of a run share."""

    def __init__(self, args: argparse.Namespace, say: Say) -> None:
        self.args = args
        self.say = say
        if args.profile:
            require_matplotlib()
        if args.temperature and args.peer in {"transformers", "transformers-batching"}:
            raise BenchError(f"--temperature: --peer {args.peer} answers greedily")
        self.watch = Watch(strict=bool(args.peer) and not args.noisy, say=say)
        self.folder = resolve(args.model)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.texts = read_prompts(args.prompts) if args.prompts else list(BUILT_IN)
        self.tokenizer = Tokenizer.load(self.folder)
        self.prompts = self._prompts()
        self.watch.look("at the start")
        say("reference: transformers generate, fp32, one stream")
        self.checked = self.prompts[: args.reference_prompts]
        self.reference = reference.transformers_answers(self.folder, self.checked, args.max_tokens)
        self.judge = reference.load_judge(self.folder, _CONTEXT)

    def rounds(self) -> tuple[reference.Check, list[Result], list[dict[str, Any]]]:
        """The check, all results, and the facts of Offramp and its peer."""
        args = self.args
        # Where nothing was rounded, tokens have to equal the reference's.
        exact = args.dtype == "float32" and (args.device != "cpu" or args.weights == "fp32")
        exact = exact and args.kv_cache_dtype in {"auto", "float32"}
        with ExitStack() as stack:
            systems = self._systems(stack, self._capacity())
            ours = systems[0].target
            checked = reference.check(
                ours,
                self.checked,
                self.reference,
                self.judge,
                concurrency=max(args.concurrency),
                max_tokens=args.max_tokens,
                exact=exact,
            )
            entries = [Entry(mode, ours) for mode in args.modes]
            entries += [Entry(each.name, each.target, is_peer=True) for each in systems[1:]]
            results: list[Result] = []
            for concurrency in args.concurrency:
                plan = Plan(
                    concurrency,
                    args.requests or max(4, 2 * concurrency),
                    args.rounds,
                    args.max_tokens,
                    ignore_eos=bool(args.peer),
                    seen_before=bool(args.url) and not args.peer,
                    temperature=args.temperature,
                )
                results += run_rounds(plan, entries, self.prompts, self.watch, self.say)
            return checked, results, [system.document() for system in systems]

    def long_prompt(self) -> dict[str, Any]:
        """The long prompt on systems of its own, which hold it and keep what they saw."""
        length = self.args.long_prompt
        prompts = [
            long_prompt(self.tokenizer, self.texts, length, number)
            for number in range(self.args.rounds + 1)
        ]
        context = _blocks(length + LONG_PROMPT_ANSWER)
        capacity = Capacity(1, context, torch.get_num_threads(), keep_prompts=True)
        with ExitStack() as stack:
            systems = self._systems(stack, capacity)
            self.watch.look("before the long prompt")
            with self.watch.during("the long prompt"):
                found = measure_long(systems, prompts, mode=self.args.modes[0], say=self.say)
            found["peak_memory_mib"] = {
                system.name: system.document()["peak_memory_mib"] for system in systems
            }
        return found

    def profile(self) -> dict[str, Any]:
        """The parts of a decode step, also drawn."""
        args = self.args
        self.say("profiling")
        config = engine_config(args, self._capacity())
        engine = build_engine(config, self.folder, model_name=args.model)
        gc.freeze()
        found = profile(engine, self.prompts, args.concurrency, args.max_tokens)
        weights = f"weights {args.weights}, {torch.get_num_threads()} threads"
        draw(found, f"A decode step of {args.model}, {weights}", args.profile)
        return found

    def _systems(self, stack: ExitStack, capacity: Capacity) -> list[System]:
        self.say("starting what is measured")
        ours = stack.enter_context(offramp(self.args, self.folder, capacity))
        theirs = stack.enter_context(peer(self.args, self.folder, capacity))
        return [ours] if theirs is None else [ours, theirs]

    def _capacity(self) -> Capacity:
        """Enough for every prompt with its answer, at the highest concurrency."""
        longest = max(map(len, self.prompts)) + self.args.max_tokens
        return Capacity(max(self.args.concurrency), _blocks(longest), torch.get_num_threads())

    def _prompts(self) -> list[Prompt]:
        length, longest = self.args.prompt_tokens, _CONTEXT - self.args.max_tokens
        if length > longest:
            raise BenchError(f"--prompt-tokens is {length}; at most {longest} leave room to answer")
        if length:
            texts = self.texts
            # Texts begin anew in every prompt, so that answers differ.
            return [
                long_prompt(self.tokenizer, texts[number:] + texts[:number], length, number)
                for number in range(len(texts))
            ]
        chats = [[{"role": "user", "content": text}] for text in self.texts]
        ids = [self.tokenizer.encode_chat(chat, 10**6) for chat in chats]
        kept = [prompt for prompt in ids if len(prompt) <= longest]
        if not kept:
            raise BenchError(f"no prompt leaves room for an answer in {_CONTEXT} tokens")
        return kept


def _blocks(tokens: int) -> int:
    """``tokens`` in whole blocks."""
    return -(-tokens // _BLOCK) * _BLOCK
