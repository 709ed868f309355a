"""``offramp bench forms``: what it costs to hold answers to a form, and what forced text spares.

Three forms beside free answers, in one process, in turns: ``any`` allows every text, so that only
the masks cost; ``object`` is an object of strings as tools take them; ``unforced`` is the same
object, of whose text nothing is drafted. It reports only if answers in the form of any text are the
free ones, and if objects are valid and the same with and without forced text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.models.loading.sources import resolve
from offramp.models.sampling_params import DraftSource, ExitMode, ExitSettings, SamplingParams
from offramp.server.bench.common import Refused, Report, Say, columns, spread, table, today
from offramp.server.bench.device import machine_facts
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import FinishReason, GenerationRequest
from offramp.server.text.grammars import Form, Grammar, GrammarCompiler, GrammarState, source_of
from offramp.server.text.prompts import BUILT_IN
from offramp.server.text.tokenizer import Tokenizer

_FREE, _ANY, _OBJECT, _UNFORCED = "free", "any", "object", "unforced"
_FIELDS = ("title", "summary", "author", "language", "category", "audience")
_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 64} for name in _FIELDS},
    "required": list(_FIELDS),
    "additionalProperties": False,
}
_COLUMNS = columns(
    "mode {mode} | streams {concurrency} | form {form} | tokens/s {per_s:.0f} | "
    "x free {ratio:.3f} | min {ratio_min:.3f} | max {ratio_max:.3f} | "
    "passes/token {passes:.3f} | forced {forced:.3f}"
)


class _Unforced(Grammar):
    """A grammar of which nothing is known ahead."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def start(self) -> GrammarState:
        """See Grammar."""
        state = self._grammar.start()
        state.forced = list  # type: ignore[method-assign]
        return state


@dataclass(slots=True)
class _Load:
    """An engine with prompts, and a counter for the names of requests."""

    engine: Engine
    prompts: Sequence[tuple[int, ...]]
    tokens: int
    names: itertools.count[int]

    def run(self, grammar: Grammar | None, mode: ExitMode, concurrency: int) -> list[Finished]:
        """Greedy answers of a round, as many as two for each stream."""
        ends = frozenset(self.engine.info.eos_token_ids)
        sampling = SamplingParams(self.tokens, temperature=0.0, stop_token_ids=ends)
        prompts = itertools.islice(itertools.cycle(self.prompts), 2 * concurrency)
        requests = [
            GenerationRequest(str(next(self.names)), prompt, sampling, ExitSettings(mode), grammar)
            for prompt in prompts
        ]
        return run_all(self.engine, requests, concurrency=concurrency)


def bench(args: argparse.Namespace, command: str, say: Say) -> Report:
    """Measure; raises Refused where answers are not what they must be."""
    folder = resolve(args.model)
    tokenizer = Tokenizer.load(folder)
    config = EngineConfig(
        model=args.model, weights=args.weights, threads=args.threads, max_model_len=2048
    )
    engine = build_engine(config, folder, model_name=args.model)
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": text}], 10**6) for text in BUILT_IN
    ]
    load = _Load(engine, prompts, args.max_tokens, itertools.count())
    compiler = GrammarCompiler(tokenizer, engine.info.vocab_size, engine.info.eos_token_ids)
    made = compiler.compile(source_of(Form("json_schema", _SCHEMA)))
    forms: dict[str, Grammar | None] = {
        _FREE: None,
        _ANY: compiler.compile(source_of(Form("regex", r"(.|\n)*"))),
        _OBJECT: made,
        _UNFORCED: _Unforced(made),
    }
    _check(load, forms, tokenizer)
    rows = [
        row
        for mode in args.modes
        for concurrency in args.concurrency
        for row in _measured(load, forms, ExitMode(mode), concurrency, args.rounds, say)
    ]
    document = {
        "command": command,
        "date": today(),
        "machine": machine_facts(),
        "model": args.model,
        "rows": rows,
    }
    return Report(f"{table(rows, _COLUMNS)}\n\n", document)


def _check(load: _Load, forms: Mapping[str, Grammar | None], tokenizer: Tokenizer) -> None:
    free, held, objects, slow = (
        load.run(forms[name], ExitMode.OFF, 4) for name in (_FREE, _ANY, _OBJECT, _UNFORCED)
    )
    if [each.token_ids for each in free] != [each.token_ids for each in held]:
        raise Refused("answers in a form that allows any text differ from free ones")
    if [each.token_ids for each in objects] != [each.token_ids for each in slow]:
        raise Refused("answers differ with and without forced text")
    for each in objects:
        ids = [
            token for token in each.token_ids if token not in each.request.sampling.stop_token_ids
        ]
        text = tokenizer.decode(ids)
        if each.reason is FinishReason.LENGTH:
            raise Refused("an answer has more tokens than --max-tokens")
        try:
            found = json.loads(text)
        except ValueError:
            raise Refused(f"an answer is no JSON: {text[:80]!r}") from None
        if list(found) != list(_FIELDS):
            raise Refused(f"an answer has other fields: {text[:80]!r}")


def _measured(
    load: _Load,
    forms: Mapping[str, Grammar | None],
    mode: ExitMode,
    concurrency: int,
    rounds: int,
    say: Say,
) -> list[dict[str, Any]]:
    """Figures of all forms under one load; each round begins with another form."""
    speeds: dict[str, list[float]] = {name: [] for name in forms}
    done: dict[str, list[Finished]] = {name: [] for name in forms}
    for grammar in forms.values():
        load.run(grammar, mode, concurrency)
    names = list(forms)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            found = load.run(forms[name], mode, concurrency)
            begun = min(each.submitted_at for each in found)
            seconds = max(each.times[-1] for each in found) - begun
            speeds[name].append(sum(len(each.token_ids) for each in found) / seconds)
            done[name] += found
        say(f"{mode}, {concurrency} streams: round {index + 1} of {rounds}")
    return [_row(name, mode, concurrency, speeds, done[name]) for name in forms]


def _row(
    name: str,
    mode: ExitMode,
    concurrency: int,
    speeds: Mapping[str, Sequence[float]],
    done: Sequence[Finished],
) -> dict[str, Any]:
    stats = [each.stats for each in done if each.stats is not None]
    tokens = sum(len(each.token_ids) for each in done)
    forced = sum(own.drafts.get(DraftSource.GRAMMAR, (0, 0))[1] for own in stats)
    ratios = spread(speeds[name], speeds[_FREE])
    return {
        "mode": mode.value,
        "concurrency": concurrency,
        "form": name,
        "per_s": round(statistics.median(speeds[name]), 1),
        "ratio": ratios["median"],
        "ratio_min": ratios["min"],
        "ratio_max": ratios["max"],
        "passes": round(sum(own.passes for own in stats) / tokens, 4),
        "forced": round(forced / tokens, 4),
    }
