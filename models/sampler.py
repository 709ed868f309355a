"""Choose the next token of each row from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.kernels.sampling import draw_token, uniform
from offramp.models.step import HeadRow


def sample(logits: Tensor, rows: Sequence[HeadRow]) -> list[int]:
    """Tokens for ``logits`` [n, vocab] (fp32, changed in place where a row adjusts them)."""
    for index, row in enumerate(rows):
        if row.sampling.adjusts_logits:
            _adjust(logits[index], row)
    # On a CPU numpy finds a maximum ten times as fast as torch.
    most = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(dim=-1)
    tokens: list[int] = most.tolist()
    for index, row in enumerate(rows):
        params = row.sampling
        if params.temperature > 0:
            draw = uniform(params.seed, row.index)
            filters = params.top_k, params.top_p, params.min_p
            tokens[index] = draw_token(logits[index], params.temperature, *filters, draw)
    return tokens


def _adjust(logits: Tensor, row: HeadRow) -> None:
    """Bias, penalties (OpenAI's formula; repetition as in CTRL, arXiv 1909.05858), min_tokens."""
    params = row.sampling
    for token, bias in params.logit_bias:
        logits[token] += bias
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        answer = torch.tensor(row.tokens[row.num_prompt :], dtype=torch.long, device=logits.device)
        used, counts = answer.unique(return_counts=True)
        logits[used] -= params.presence_penalty + params.frequency_penalty * counts
    if row.index < params.min_tokens and params.stop_token_ids:
        logits[torch.tensor(sorted(params.stop_token_ids), device=logits.device)] = -torch.inf
