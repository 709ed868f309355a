"""One run of the benchmark, from the model to the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from offramp.models.loading.sources import resolve
from offramp.server.bench import document, reference, rows
from offramp.server.bench.check import Check, check
from offramp.server.bench.errors import LoadError
from offramp.server.bench.long_prompt import MAX_TOKENS, long_prompt, measure_long
from offramp.server.bench.profile import draw, profile, require_matplotlib
from offramp.server.bench.prompts import BUILT_IN, read_prompts
from offramp.server.bench.quiet import Watch
from offramp.server.bench.rounds import Entry, Plan, Result, run_rounds
from offramp.server.bench.sides import Room, Side, engine_config, offramp, peer
from offramp.server.engine.build import build_engine
from offramp.server.text.tokenizer import Tokenizer

Say = Callable[[str], None]
_CONTEXT = 2048
_BLOCK = 256


def _exact(args: argparse.Namespace) -> bool:
    """Whether tokens have to equal the reference's: nothing was rounded."""
    rounded = args.dtype != "float32" or (args.device == "cpu" and args.weights != "fp32")
    return not rounded


def bench(args: argparse.Namespace, say: Say) -> None:
    """Measure and print the report.

    Raises LoadError, Refused, NotQuiet, and what loading models, prompts and engines raises.
    """
    run = _Run(args, say)
    checked, results, sides = run.rounds()
    long = run.long_prompt() if args.long_prompt else None
    profiled = run.profile() if args.profile else None
    run.watch.look("at the end")
    say("judging the answers")
    without = run.judge.config.eos_token_ids if args.peer else ()
    report = document.Report(
        args=args,
        reference=run.reference,
        check=asdict(checked),
        rows=rows.rows(results, run.judge, without),
        results=results,
        sides=sides,
        quiet=run.watch.document(),
        long_prompt=long,
        profile=profiled,
    )
    sys.stdout.write(report.text())


class _Run:
    """What the parts of a run share."""

    def __init__(self, args: argparse.Namespace, say: Say) -> None:
        self.args = args
        self.say = say
        if args.profile:
            require_matplotlib()
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

    def rounds(self) -> tuple[Check, list[Result], list[dict[str, Any]]]:
        """The check, all results, and the facts of both sides."""
        args = self.args
        longest = max(map(len, self.prompts)) + args.max_tokens
        room = self._room(max(args.concurrency), longest)
        with ExitStack() as stack:
            sides = self._sides(stack, room)
            checked = check(
                sides[0].target,
                self.checked,
                self.reference,
                self.judge,
                company=max(args.concurrency),
                max_tokens=args.max_tokens,
                exact=_exact(args),
            )
            entries = [Entry(mode, sides[0].target) for mode in args.modes]
            entries += [Entry(side.name, side.target, is_peer=True) for side in sides[1:]]
            results: list[Result] = []
            for concurrency in args.concurrency:
                plan = self._plan(concurrency)
                results += run_rounds(plan, entries, self.prompts, self.watch, self.say)
            return checked, results, [side.document() for side in sides]

    def long_prompt(self) -> dict[str, Any]:
        """The long prompt on sides of its own, which have room for it and keep what they saw."""
        length = self.args.long_prompt
        prompts = [
            long_prompt(self.tokenizer, self.texts, length, number)
            for number in range(self.args.rounds + 1)
        ]
        room = self._room(1, length + MAX_TOKENS, keep_prompts=True)
        with ExitStack() as stack:
            sides = self._sides(stack, room)
            self.watch.look("before the long prompt")
            with self.watch.during("the long prompt"):
                found = measure_long(sides, prompts, mode=self.args.modes[0], say=self.say)
            found["peak_memory_mib"] = {
                side.name: side.document()["peak_memory_mib"] for side in sides
            }
        return found

    def profile(self) -> dict[str, Any]:
        """The parts of a decode step, also drawn."""
        args = self.args
        longest = max(map(len, self.prompts)) + args.max_tokens
        room = self._room(max(args.concurrency), longest)
        self.say("profiling")
        engine = build_engine(engine_config(args, room), self.folder, model_name=args.model)
        found = profile(engine, self.prompts, args.concurrency, args.max_tokens)
        weights = f"weights {args.weights}, {torch.get_num_threads()} threads"
        draw(found, f"A decode step of {args.model}, {weights}", args.profile)
        return found

    def _sides(self, stack: ExitStack, room: Room) -> list[Side]:
        self.say("starting what is measured")
        ours = stack.enter_context(offramp(self.args, self.folder, room))
        theirs = stack.enter_context(peer(self.args, self.folder, room))
        return [ours] if theirs is None else [ours, theirs]

    def _prompts(self) -> list[tuple[int, ...]]:
        chats = [[{"role": "user", "content": text}] for text in self.texts]
        ids = [self.tokenizer.encode_chat(chat, 10**6) for chat in chats]
        kept = [prompt for prompt in ids if len(prompt) + self.args.max_tokens <= _CONTEXT]
        if not kept:
            raise LoadError(f"no prompt leaves room for an answer in {_CONTEXT} tokens")
        return kept

    def _plan(self, concurrency: int) -> Plan:
        args = self.args
        return Plan(
            concurrency,
            args.requests or max(4, 2 * concurrency),
            args.rounds,
            args.max_tokens,
            ignore_eos=bool(args.peer),
            seen_before=bool(args.url) and not args.peer,
        )

    def _room(self, slots: int, tokens: int, *, keep_prompts: bool = False) -> Room:
        context = -(-tokens // _BLOCK) * _BLOCK
        return Room(slots, context, torch.get_num_threads(), keep_prompts)
