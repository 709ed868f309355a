"""Whether the decode loop makes the tokens of the runner's single steps, on the measured device.

They are compared in fp32 on a tiny model, where rounding decides nothing: several sequences at
once, each with its own thresholds, with and without holding tokens back. If they differ, nothing is
reported.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from offramp.models.device_loop import DeviceLoop, DeviceToken
from offramp.models.exits.head import ExitHead
from offramp.models.kv_cache import KVCache
from offramp.models.loading.formats import as_they_are
from offramp.models.runner import Runner
from offramp.models.sampling_params import DEFAULT_CRITERION, NEVER, KVFill, SamplingParams
from offramp.models.shapes import MODEL_SHAPES
from offramp.models.step import (
    ExitCheck,
    FillKV,
    HeadRow,
    OwedRows,
    RunSegments,
    SequenceRows,
)
from offramp.models.transformer import Transformer
from offramp.server.bench.common import Refused
from offramp.server.bench.engine.model import (
    random_heads,
    random_tokens,
    random_weights,
    start_greedy,
)
from offramp.server.bench.engine.options import default_exits

_BLOCK, _BLOCKS = 4, 8
_SEQS, _TOKENS = 6, 10
# Logits this much wider have top probabilities anywhere in 0 to 1, so scores meet thresholds.
_SHARPNESS = 4.0
_GREEDY = SamplingParams(max_tokens=_TOKENS, temperature=0.0)
_HOLDS = ((0.0, 0.0), (0.9, 3.0), (0.9, 2.0), (0.8, 2.0))


@dataclass(frozen=True, slots=True)
class _Text:
    tokens: Sequence[int]
    table: Sequence[int]
    thresholds: tuple[float, ...]


def check_loop(device: torch.device, seed: int) -> dict[str, object]:
    """What was compared; raises Refused where tokens or depths differ."""
    runner = _runner(device, seed)
    texts = _texts(runner, seed)
    kept = runner.cache.pages.clone()
    wanted = [_by_steps(runner, text) for text in texts]
    loop = runner.device_loop(_SEQS, _BLOCKS)
    segments = len(runner.exits.heads) + 1
    for holds in (((0.0, 0.0),) * segments, _HOLDS[:segments]):
        runner.cache.pages.copy_(kept)
        found = _by_loop(loop, texts, holds)
        for seq, (made, right) in enumerate(zip(found, wanted, strict=True)):
            if made != right:
                at = next(
                    i for i, pair in enumerate(zip(made, right, strict=True)) if len({*pair}) > 1
                )
                raise Refused(
                    f"the decode loop differs from single steps in sequence {seq}, token "
                    f"{at}: {made[at]} instead of {right[at]}"
                )
    depths = sorted({result.depth for tokens in wanted for result in tokens})
    return {
        "model": "tiny, fp32",
        "slots": _SEQS,
        "tokens": _SEQS * _TOKENS,
        "depths": depths,
        "holds": True,
        "equal": True,
    }


def _runner(device: torch.device, seed: int) -> Runner:
    # With tied random weights the model repeats its input token.
    config = replace(MODEL_SHAPES["tiny"], tie_word_embeddings=False)
    weights = random_weights(config, torch.float32, device, seed)
    weights["lm_head"] *= _SHARPNESS
    exits = default_exits(config.num_layers)
    model = Transformer(config, weights, exits, _BLOCK * _BLOCKS, as_they_are())
    heads = [_mixed(head) for head in random_heads(model, 32, 16, seed)]
    cache = KVCache(config, _SEQS * _BLOCKS, _BLOCK, torch.float32, device)
    # So that reading what was never written shows in the tokens.
    cache.pages.fill_(float("nan"))
    return Runner(model, heads, cache, 32)


def _mixed(head: ExitHead) -> ExitHead:
    """Every second exit weighs gate and logits, the others take the top-2 gap."""
    if head.layer % 2:
        return head
    fuse = torch.tensor([0.4, 0.6, 0.5, 1.0], device=head.scale.device)
    return replace(head, floor=0.3, fuse=fuse)


def _texts(runner: Runner, seed: int) -> list[_Text]:
    """Prompts of different lengths, in the pages but for their last token."""
    exits = len(runner.exits.heads)
    chance = random.Random(seed)  # noqa: S311 (thresholds are no secret)
    special = [(NEVER,) * exits, (0.0,) * exits]
    made = []
    for seq in range(_SEQS):
        blocks = range(seq * _BLOCKS, (seq + 1) * _BLOCKS)
        drawn = tuple(chance.uniform(0.1, 0.9) for _ in range(exits))
        tokens = random_tokens(runner.model.config, 3 + 2 * seq, seed + seq)
        text = _Text(tokens, blocks[::-1], special[seq] if seq < len(special) else drawn)
        before = range(len(tokens) - 1)
        work = SequenceRows(before, tuple(before), text.table, tuple(tokens[:-1]))
        runner.run(RunSegments(0, exits, (work,)))
        made.append(text)
    return made


def _by_steps(runner: Runner, text: _Text) -> list[DeviceToken]:
    """The next tokens, one segment after another, K,V of skipped layers projected at once."""
    tokens, made = list(text.tokens), list[DeviceToken]()
    for index in range(_TOKENS):
        head = HeadRow(0, _GREEDY, index, (), 0)
        made.append(next_by_steps(runner, text.table, text.thresholds, tokens, head))
        tokens.append(made[-1].token)
    return made


def next_by_steps(
    runner: Runner,
    table: Sequence[int],
    thresholds: Sequence[float],
    tokens: Sequence[int],
    head: HeadRow,
) -> DeviceToken:
    """The token behind ``tokens``, whose K,V but the last one's lie in the blocks of ``table``.

    It leaves where its score reaches the exit's threshold, and K,V above are projected; ``head``
    says how it is chosen, from hidden row 0.
    """
    position = len(tokens) - 1
    for segment, exit_head in enumerate(runner.exits.heads):
        check = ExitCheck(DEFAULT_CRITERION, thresholds[segment], head)
        ids = (tokens[-1],) if segment == 0 else ()
        work = SequenceRows((position,), (0,), table, ids, check)
        result = runner.run(RunSegments(segment, segment, (work,)))
        if result.leave == (True,):
            owed = OwedRows(segment + 1, (position,), (0,), table)
            runner.run(FillKV(KVFill.PROJECT, (owed,)))
            return DeviceToken(result.token_ids[0], exit_head.layer)
    top, ids = len(runner.exits.heads), (tokens[-1],) if not runner.exits.heads else ()
    work = SequenceRows((position,), (0,), table, ids)
    token = runner.run(RunSegments(top, top, (work,), (head,))).head_tokens[0]
    return DeviceToken(token, runner.model.config.num_layers)


def _by_loop(
    loop: DeviceLoop, texts: Sequence[_Text], holds: Sequence[tuple[float, float]]
) -> list[list[DeviceToken]]:
    loop.hold(holds)
    start_greedy(
        loop,
        [(text.tokens[-1], len(text.tokens) - 1) for text in texts],
        [text.table for text in texts],
        [text.thresholds for text in texts],
        _BLOCK * _BLOCKS,
    )
    made: list[list[DeviceToken]] = [[] for _ in texts]
    running = loop.launch(_SEQS)
    # A token waits for three launches at most at each of three segments, so thirteen are enough.
    for _ in range(13 * _TOKENS):
        following = loop.launch(_SEQS)
        for seq, token in running.result().tokens.items():
            made[seq].append(token)
        running = following
        if all(len(tokens) >= _TOKENS for tokens in made):
            return [tokens[:_TOKENS] for tokens in made]
    raise Refused(f"the decode loop made no {_TOKENS} tokens in {13 * _TOKENS} passes")
