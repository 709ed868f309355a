"""Choose the next token of each row from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.kernels.sampling import uniform
from offramp.models.sampling_params import SamplingParams
from offramp.models.step import HeadRow

# Nucleus and top-k choices almost always lie among the best few hundred tokens; sorting only those
# is 20 times cheaper than sorting a whole vocabulary, and the rare row that needs more gets it.
_SHORTLIST = 512
# Far below it fp32 has no number for a temperature, and all below it are greedy anyway.
_COLDEST = 1e-30


def sample(logits: Tensor, rows: Sequence[HeadRow]) -> list[int]:
    """Tokens for ``logits`` [n, vocab] (fp32, changed in place where a row adjusts them)."""
    for index, row in enumerate(rows):
        if row.sampling.adjusts_logits:
            _adjust(logits[index], row)
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for index, row in enumerate(rows):
        if row.sampling.temperature > 0:
            draw = uniform(row.sampling.seed, row.index)
            tokens[index] = _draw(logits[index], row.sampling, draw)
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


def _draw(logits: Tensor, params: SamplingParams, draw: float) -> int:
    """Inverse-CDF draw from the filtered distribution of one row."""
    # The best logit becomes 0 first, so that a tiny temperature overflows to -inf, never to NaN.
    logits = (logits - logits.max()) / max(params.temperature, _COLDEST)
    if not params.top_k and params.top_p >= 1.0 and params.min_p <= 0.0:
        mass = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        return _pick(mass, draw)
    values, ids = _candidates(logits, params)
    mass = (values - values[0]).exp().double().cumsum(dim=-1)
    return int(ids[_pick(mass, draw)])


def _pick(mass: Tensor, draw: float) -> int:
    """First index whose cumulative ``mass`` exceeds ``draw`` times the total."""
    index = torch.searchsorted(mass, mass[-1] * draw, right=True)
    return min(int(index), mass.shape[0] - 1)


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Logits (descending) and ids that survive top_k, then top_p, then min_p."""
    size = logits.shape[0]
    shortlist = min(size, max(_SHORTLIST, params.top_k))
    values, ids = logits.topk(min(size, params.top_k) if params.top_k else shortlist)
    total = torch.logsumexp(values if params.top_k else logits, dim=-1)
    probs = (values - total).exp()
    enough = (
        params.top_k > 0
        or (params.top_p < 1.0 and float(probs.sum()) >= params.top_p)
        or (params.min_p > 0.0 and float(probs[-1]) < params.min_p * float(probs[0]))
    )
    if not enough:
        values, ids = logits.sort(descending=True)
        probs = (values - total).exp()
    keep = probs >= params.min_p * probs[0]
    if params.top_p < 1.0:
        # A token stays while the mass before it is below top_p; in fp32 a long sum goes astray.
        mass = probs.cumsum(dim=-1, dtype=torch.float64)
        keep &= mass - probs < params.top_p
    # The best one always stays.
    keep[0] = True
    return values[keep], ids[keep]
