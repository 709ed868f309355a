"""With exits off the engine says exactly what transformers says, on real weights and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offramp.kernels.native import library
from offramp.models.config import Weights
from offramp.models.exits.file import ExitFile
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.sampling_params import ExitMode, ExitSettings, SamplingParams
from offramp.models.transformer import Transformer
from offramp.server.bench.reference import transformers_answers
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import GenerationRequest
from offramp.server.text.tokenizer import Tokenizer

# The reference alone takes a minute and more: it makes a thousand tokens one by one.
pytestmark = [pytest.mark.weights, pytest.mark.timeout(900)]

PROMPTS = Path(__file__).parents[2] / "data" / "prompts.txt"
CONTEXT = 1024
BLOCK = 32
TOKENS = 20
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0)


@pytest.fixture(scope="session")
def prompts(smollm2_dir: Path) -> list[tuple[int, ...]]:
    tokenizer = Tokenizer.load(smollm2_dir)
    texts = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [tokenizer.encode_chat([{"role": "user", "content": text}], 10**6) for text in texts]


@pytest.fixture(scope="session")
def reference(smollm2_dir: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Greedy answers of transformers' generate in fp32, one prompt at a time."""
    return transformers_answers(smollm2_dir, prompts, TOKENS).answers


@pytest.fixture(scope="session")
def exits(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Untrained exits: they cut the stack into segments, and no token leaves."""
    config = config_from_hf(smollm2_dir)
    weights = load_weights(smollm2_dir, config, dtype=torch.float32)
    model = Transformer(config, weights, (12, 22, 26), 8)
    options = TrainOptions(width=4, router=4)
    heads = tuple(new_head(layer, model, options) for layer in model.exit_layers)
    path = tmp_path_factory.mktemp("exits") / "exits.safetensors"
    ExitFile(fingerprint(weights), heads, {}, {}).save(path)
    return str(path)


def build(
    folder: Path,
    exits: str,
    num_blocks: int,
    *,
    on_device: bool = False,
    weights: Weights = Weights.FP32,
    coarse: bool = False,
) -> Engine:
    """An engine that checks its invariants after every step.

    ``on_device`` it is on a GPU, if there is one, and decides as it would there; ``coarse`` its
    weights are kept as published, and inputs in 8 bits.
    """
    on_gpu = on_device and torch.cuda.is_available()
    config = EngineConfig(
        exits=exits,
        weights=Weights.AUTO if on_gpu or coarse else weights,
        activation_dtype="int8" if coarse else "auto",
        dtype="float32",
        device="cuda" if on_gpu else "cpu",
        max_model_len=CONTEXT,
        block_size=BLOCK,
        max_num_seqs=16,
    )
    return build_engine(
        config,
        folder,
        model_name="test",
        num_blocks=num_blocks,
        on_device=on_device,
        check_invariants=True,
    )


def answers(
    engine: Engine,
    prompts: list[tuple[int, ...]],
    concurrency: int,
    modes: Sequence[ExitMode] = (ExitMode.OFF,),
) -> tuple[list[list[int]], list[Finished]]:
    """Greedy answers; the prompts take the ``modes`` in turn."""
    greedy = replace(GREEDY, stop_token_ids=frozenset(engine.info.eos_token_ids))
    requests = [
        GenerationRequest(str(i), prompt, greedy, ExitSettings(modes[i % len(modes)]))
        for i, prompt in enumerate(prompts)
    ]
    done = run_all(engine, requests, concurrency=concurrency)
    return [item.token_ids for item in done], done


def test_prompts_are_of_mixed_length(prompts: list[tuple[int, ...]]) -> None:
    lengths = sorted(map(len, prompts))
    assert len(prompts) >= 50
    assert lengths[0] < 50
    assert lengths[-3] > 300
    assert lengths[-1] + TOKENS <= CONTEXT


def test_alone(
    smollm2_dir: Path, exits: str, prompts: list[tuple[int, ...]], reference: list[list[int]]
) -> None:
    """One request at a time, short ones and long ones."""
    engine = build(smollm2_dir, exits, 64)
    found, _ = answers(engine, prompts[::7], 1)
    assert found == reference[::7]


def test_in_a_mixed_batch_and_again_from_the_cache(
    smollm2_dir: Path, exits: str, prompts: list[tuple[int, ...]], reference: list[list[int]]
) -> None:
    """Prefill and decode of all lengths share steps; the second time K,V come from the cache."""
    engine = build(smollm2_dir, exits, 320)
    assert answers(engine, prompts, 16)[0] == reference
    found, done = answers(engine, prompts, 16)
    assert found == reference
    cached = [item.stats.cached_tokens for item in done if item.stats is not None]
    assert cached == [min(len(prompt) // BLOCK * BLOCK, len(prompt) - 1) for prompt in prompts]


def test_under_preemption(
    smollm2_dir: Path, exits: str, prompts: list[tuple[int, ...]], reference: list[list[int]]
) -> None:
    """Too few blocks for all: the newest are sent back and prefilled again."""
    engine = build(smollm2_dir, exits, CONTEXT // BLOCK)
    found, done = answers(engine, prompts[2::3], 16)
    assert found == reference[2::3]
    assert sum(item.stats.preemptions for item in done if item.stats is not None) > 0


def test_decided_on_the_device(
    smollm2_dir: Path, exits: str, prompts: list[tuple[int, ...]], reference: list[list[int]]
) -> None:
    """The device loop of GPUs, without one by its references: mixed lengths, four segments."""
    engine = build(smollm2_dir, exits, 320, on_device=True)
    found, _ = answers(engine, prompts[1::4], 16)
    assert found == reference[1::4]


def test_lossless_alone_and_in_mixed_company(
    smollm2_dir: Path, prompts: list[tuple[int, ...]], reference: list[list[int]]
) -> None:
    """Guesses of the shipped exits and of the text itself, verified, beside requests without."""
    engine = build(smollm2_dir, "auto", 320)
    found, done = answers(engine, prompts[::5], 1, [ExitMode.LOSSLESS])
    assert found == reference[::5]
    accepted = sum(item.stats.accepted for item in done if item.stats is not None)
    assert accepted > len(done)
    found, _ = answers(engine, prompts, 16, [ExitMode.LOSSLESS, ExitMode.OFF])
    assert found == reference


def test_inputs_of_8_bits(
    smollm2_dir: Path, prompts: list[tuple[int, ...]], reference: list[list[int]]
) -> None:
    """Most answers of 20 tokens stay, and none depends on what is beside it or was guessed."""
    if library() is None:
        pytest.skip("no C kernels on this machine")
    engine = build(smollm2_dir, "auto", 320, coarse=True)
    together, _ = answers(engine, prompts, 16)
    same = [own == other for own, other in zip(together, reference, strict=True)]
    assert 0.6 * len(same) < sum(same) < len(same)
    assert answers(engine, prompts[::5], 1, [ExitMode.LOSSLESS])[0] == together[::5]
    assert answers(engine, prompts, 16, [ExitMode.LOSSLESS, ExitMode.OFF])[0] == together


def test_inputs_of_8_bits_for_those_who_allow_them(
    smollm2_dir: Path, prompts: list[tuple[int, ...]]
) -> None:
    """In one batch with others, whose tokens and cached prompts stay those of 16 bits."""
    if library() is None:
        pytest.skip("no C kernels on this machine")
    prompts = prompts[::2]
    coarse, _ = answers(build(smollm2_dir, "auto", 320, coarse=True), prompts, 16)
    engine = build(smollm2_dir, "auto", 320, weights=Weights.AUTO)
    fine, _ = answers(engine, prompts, 16)
    assert engine.info.coarse_quality is not None
    engine.thresholds.allow_coarse(1.0, 1.2)
    modes = [ExitMode.ADAPTIVE, ExitMode.LOSSLESS, ExitMode.ADAPTIVE, ExitMode.OFF]
    for _ in range(2):
        found, done = answers(engine, prompts, 16, modes)
        for index, (tokens, item) in enumerate(zip(found, done, strict=True)):
            assert item.stats is not None
            assert item.stats.coarse == (index % 2 == 0)
            assert tokens == (fine if index % 2 else coarse)[index]
