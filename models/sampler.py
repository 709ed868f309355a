"""Choose the next token of each row from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.kernels.sampling import TokenDraw, draw_tokens
from offramp.models.step import HeadRow, ScoredRow, TokenLogprobs


def sample(
    logits: Tensor,
    rows: Sequence[HeadRow],
    best: Sequence[int] | None = None,
    ids: Tensor | None = None,
) -> list[int]:
    """Places of tokens in ``logits`` [n, vocab] (fp32, changed in place where a row adjusts them).

    ``best`` are the places of the largest ones, where the C kernels found them; ``ids`` (int64
    [vocab]) the tokens' ids if the places are not.
    """
    adjusted = [index for index, row in enumerate(rows) if row.adjusts_logits]
    for index in adjusted:
        _adjust(logits[index], rows[index])
    if best is None:
        tokens = _largest(logits)
    else:
        tokens = list(best)
        for index in adjusted:
            tokens[index : index + 1] = _largest(logits[index : index + 1])
    noises = [row.noise for row in rows]
    draws = [
        TokenDraw(index, noise, row.sampling.top_k, row.sampling.top_p, row.sampling.min_p)
        for index, (row, noise) in enumerate(zip(rows, noises, strict=True))
        if noise is not None
    ]
    if draws:
        drawn = draw_tokens(logits, draws, ids, native=best is not None)
        for draw, token in zip(draws, drawn, strict=True):
            tokens[draw.row] = token
    return tokens


def sample_with_logprobs(
    logits: Tensor, rows: Sequence[HeadRow], best: Sequence[int] | None = None
) -> tuple[list[int], tuple[TokenLogprobs | None, ...]]:
    """`sample`, and for rows that ask for them the log-probabilities before any change.

    The second is empty where no row asks.
    """
    asking = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asking:
        return sample(logits, rows, best), ()
    before = logits[asking].clone()
    tokens = sample(logits, rows, best)
    chosen = [tokens[index] for index in asking]
    tops = [rows[index].sampling.logprobs or 0 for index in asking]
    found = dict(zip(asking, token_logprobs(before, chosen, tops), strict=True))
    return tokens, tuple(found.get(index) for index in range(len(rows)))


def score(logits: Tensor, rows: Sequence[ScoredRow]) -> list[TokenLogprobs]:
    """What ``logits`` [n, vocab] say of the tokens that are known to follow."""
    return token_logprobs(logits, [row.token for row in rows], [row.top for row in rows])


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    """Log-probabilities of ``tokens``, one for each row of ``logits`` [n, vocab].

    With each come as many best tokens as ``tops`` says.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ids = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, ids)
    ranks = ((logprobs > own).sum(dim=1) + 1).tolist()
    most = min(max(tops), logprobs.shape[1])
    best = logprobs.topk(most, dim=1) if most else None
    values = best.values.tolist() if best else [[]] * len(tokens)
    places = best.indices.tolist() if best else [[]] * len(tokens)
    return [
        TokenLogprobs(logprob, rank, tuple(zip(places[row][:top], values[row][:top], strict=True)))
        for row, (logprob, rank, top) in enumerate(
            zip(own.squeeze(1).tolist(), ranks, tops, strict=True)
        )
    ]


def _largest(logits: Tensor) -> list[int]:
    # On a CPU numpy finds a maximum ten times as fast as torch.
    most = logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(dim=-1)
    found: list[int] = most.tolist()
    return found


def _adjust(logits: Tensor, row: HeadRow) -> None:
    """Bias, penalties (OpenAI's formula; repetition as in CTRL, arXiv 1909.05858), min_tokens.

    A mask comes last: what it forbids nothing else can allow.
    """
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
    if params.allowed_token_ids:
        ids = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[ids]
        logits.fill_(-torch.inf)
        logits[ids] = kept
    for word in params.bad_words:
        *before, last = word
        if not before or list(row.tokens[-len(before) :]) == before:
            logits[last] = -torch.inf
    if row.index < params.min_tokens and params.stop_token_ids and row.mask is None:
        logits[torch.tensor(sorted(params.stop_token_ids), device=logits.device)] = -torch.inf
    if row.mask is not None:
        _forbid(logits, row.mask)
        limited = params.allowed_token_ids or params.bad_words
        if limited and not bool(logits.isfinite().any()):
            # Together they allow nothing. An answer in its form ends, others would not.
            logits.zero_()
            _forbid(logits, row.mask)


def _forbid(logits: Tensor, mask: NDArray[np.int32]) -> None:
    """Make tokens impossible whose bit is not set."""
    closed = (~mask).view(np.uint8)
    forbidden = np.unpackbits(closed, bitorder="little", count=len(logits)).view(np.bool_)
    logits.masked_fill_(torch.from_numpy(forbidden).to(logits.device), -torch.inf)
