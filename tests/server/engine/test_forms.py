"""Answers in a given form and log-probabilities, on a real (tiny) model, in every mode."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM

from offramp.models.config import Weights
from offramp.models.sampling_params import DraftSource, ExitMode, ExitSettings, SamplingParams
from offramp.models.step import TokenLogprobs
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import FinishReason, GenerationRequest
from offramp.server.text.grammars import Form, Grammar, GrammarCompiler, source_of
from offramp.server.text.tokenizer import Tokenizer

from .test_engine_machine import host_of

PROMPTS = [(5, 6, 7), tuple(range(20, 60)), (300, 40, 41, 40, 41, 300, 40, 41), (77,) * 12]
GREEDY = SamplingParams(max_tokens=60, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 10, "maximum": 99},
        "sunny": {"type": "boolean"},
    },
    "required": ["city", "days", "sunny"],
    "additionalProperties": False,
}
_names = itertools.count()


@pytest.fixture(scope="module")
def engine(tiny_dir: Path) -> Engine:
    """Exits that are often wrong and always taken, and lookups wherever the text repeats."""
    config = EngineConfig(
        device="cpu",
        weights=Weights.FP32,
        max_num_seqs=8,
        exits="shared:2,3",
        max_exit_debt=5,
        max_model_len=200,
    )
    made = build_engine(config, tiny_dir, model_name="tiny", check_invariants=True)
    governor = host_of(made).governor
    governor.draft_bound = lambda segment, rows: 0.2  # type: ignore[method-assign]
    governor.ngram_length = lambda rates, size, rows: 4  # type: ignore[method-assign]
    return made


@pytest.fixture(scope="module")
def backend(tiny_dir: Path) -> Backend:
    return Backend.from_file(str(tiny_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def compiler(engine: Engine, backend: Backend) -> GrammarCompiler:
    info = engine.info
    return GrammarCompiler(Tokenizer(backend, None), info.vocab_size, info.eos_token_ids)


def answers(
    engine: Engine,
    sampling: SamplingParams,
    exits: ExitSettings,
    grammar: Grammar | None = None,
    prompts: Sequence[tuple[int, ...]] = PROMPTS,
) -> list[Finished]:
    ends = frozenset(engine.info.eos_token_ids)
    sampling = replace(sampling, stop_token_ids=ends)
    requests = [
        GenerationRequest(str(next(_names)), prompt, sampling, exits, grammar) for prompt in prompts
    ]
    return run_all(engine, requests, concurrency=len(prompts))


MODES = [
    ExitSettings(ExitMode.OFF),
    ExitSettings(ExitMode.LOSSLESS),
    ExitSettings(ExitMode.ADAPTIVE, thresholds=(0.0, 0.0), always=True),
]


@pytest.mark.parametrize("exits", MODES, ids=lambda exits: exits.mode)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_answer_keeps_to_its_schema(
    engine: Engine,
    compiler: GrammarCompiler,
    backend: Backend,
    sampling: SamplingParams,
    exits: ExitSettings,
) -> None:
    grammar = compiler.compile(source_of(Form("json_schema", SCHEMA)))
    for done in answers(engine, sampling, exits, grammar):
        assert done.reason is FinishReason.STOP
        found: Any = json.loads(backend.decode(done.token_ids))
        assert list(found) == ["city", "days", "sunny"]
        assert len(found["city"]) <= 6
        assert 10 <= found["days"] <= 99


def test_exits_are_taken_in_adaptive_mode(engine: Engine, compiler: GrammarCompiler) -> None:
    """So that the schema above is kept to at exits too."""
    grammar = compiler.compile(source_of(Form("json_schema", SCHEMA)))
    layers = {
        layer for done in answers(engine, GREEDY, MODES[2], grammar) for layer in done.exit_layers
    }
    assert min(layers) == 2


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "form",
    [
        Form("json_schema", SCHEMA),
        Form("regex", "([a-c]{2,5} ){4}end"),
        Form("choice", ("aa", "ab")),
    ],
    ids=lambda form: form.kind,
)
def test_drafts_and_forced_text_change_no_answer(
    engine: Engine, compiler: GrammarCompiler, sampling: SamplingParams, form: Form
) -> None:
    """Without any draft, one token a pass under the same mask, is what all ways must give."""
    grammar = compiler.compile(source_of(form))
    plain = answers(engine, sampling, MODES[0], _Unforced(grammar))
    assert all(done.stats and not done.stats.drafted for done in plain)
    for exits in MODES[:2]:
        found = answers(engine, sampling, exits, grammar)
        assert [done.token_ids for done in found] == [done.token_ids for done in plain]
        assert {done.reason for done in found} == {FinishReason.STOP}


class _Unforced(Grammar):
    """The same grammar, of which nothing is known ahead."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def start(self) -> Any:
        state = self._grammar.start()
        state.forced = list  # type: ignore[method-assign]
        return state


def test_forced_text_takes_no_passes_of_its_own(engine: Engine, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(source_of(Form("regex", "x{40}[ab]")))
    (done,) = answers(engine, GREEDY, MODES[0], grammar, PROMPTS[:1])
    assert done.stats is not None
    assert len(done.token_ids) == 41
    drafted, accepted = done.stats.drafts[DraftSource.GRAMMAR]
    assert drafted >= accepted >= 30
    assert done.stats.passes <= 8


def test_a_length_that_is_too_short_says_so(engine: Engine, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(source_of(Form("json_schema", SCHEMA)))
    for exits in MODES:
        for done in answers(engine, replace(GREEDY, max_tokens=5), exits, grammar):
            assert done.reason is FinishReason.LENGTH
            assert len(done.token_ids) == 5


@pytest.fixture(scope="module")
def reference(tiny_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


def of_reference(reference: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [tokens - 1, vocabulary] of what may follow each token."""
    with torch.inference_mode():
        logits = reference(torch.tensor([list(tokens)])).logits[0, :-1]
    found: torch.Tensor = logits.float().log_softmax(-1)
    return found


def check(found: TokenLogprobs, expected: torch.Tensor, token: int, top: int) -> None:
    assert found.logprob == pytest.approx(float(expected[token]), abs=1e-3)
    assert found.rank == int((expected > expected[token]).sum()) + 1
    assert len(found.top) == top
    best = expected.topk(top)
    assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("exits", MODES[:2], ids=lambda exits: exits.mode)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_log_probabilities_are_those_of_transformers(
    engine: Engine, reference: Any, sampling: SamplingParams, exits: ExitSettings
) -> None:
    """Of prompt and answer, before temperature and penalties; twice: caches must not hide any."""
    sampling = replace(sampling, max_tokens=12, presence_penalty=1.5, logprobs=3, prompt_logprobs=2)
    for _ in range(2):
        for done in answers(engine, sampling, exits):
            tokens = [*done.request.prompt, *done.token_ids]
            expected = of_reference(reference, tokens)
            prompt = len(done.request.prompt)
            assert len(done.prompt_logprobs) == prompt - 1
            assert len(done.logprobs) == len(done.token_ids)
            for place, own in enumerate(done.prompt_logprobs):
                check(own, expected[place], tokens[place + 1], 2)
            for place, own in enumerate(done.logprobs, start=prompt - 1):
                check(own, expected[place], tokens[place + 1], 3)


def test_a_token_that_left_has_the_log_probability_it_left_with(engine: Engine) -> None:
    sampling = replace(GREEDY, max_tokens=12, logprobs=1)
    for done in answers(engine, sampling, MODES[2]):
        assert min(done.exit_layers) < 4
        assert len(done.logprobs) == len(done.token_ids)
        # Greedy: what was chosen is the best there, at whatever depth.
        for token, own in zip(done.token_ids, done.logprobs, strict=True):
            assert own.rank == 1
            assert own.top == ((token, own.logprob),)


def test_masks_do_not_change_log_probabilities(
    engine: Engine, compiler: GrammarCompiler, reference: Any
) -> None:
    grammar = compiler.compile(source_of(Form("regex", "[ab]{12}")))
    sampling = replace(GREEDY, max_tokens=12, logprobs=0)
    (done,) = answers(engine, sampling, MODES[0], grammar, PROMPTS[:1])
    tokens = [*done.request.prompt, *done.token_ids]
    expected = of_reference(reference, tokens)
    for place, own in enumerate(done.logprobs, start=len(done.request.prompt) - 1):
        check(own, expected[place], tokens[place + 1], 0)


def test_a_long_prompt_in_chunks_is_scored_once(tiny_dir: Path, reference: Any) -> None:
    """Chunks, and blocks taken away on the way."""
    config = EngineConfig(
        device="cpu",
        weights=Weights.FP32,
        max_num_seqs=4,
        exits="none",
        max_num_batched_tokens=16,
        max_model_len=150,
    )
    small = build_engine(config, tiny_dir, model_name="tiny", num_blocks=14, check_invariants=True)
    sampling = replace(GREEDY, max_tokens=30, prompt_logprobs=0)
    prompts = [tuple(range(begin, begin + 90)) for begin in (5, 60, 120)]
    found = answers(small, sampling, MODES[0], prompts=prompts)
    assert any(done.stats and done.stats.preemptions for done in found)
    for done in found:
        expected = of_reference(reference, done.request.prompt)
        assert len(done.prompt_logprobs) == 89
        for place, own in enumerate(done.prompt_logprobs):
            check(own, expected[place], done.request.prompt[place + 1], 0)
