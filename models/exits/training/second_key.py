"""What exits predict over a reduced vocabulary, and the second key that is fitted to it.

Few tokens make up nearly all text, and on a small model the LM head costs as much as several
layers; FR-Spec (arXiv 2502.14856) reduces a drafter's head the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exits.criteria import PREDICTOR_TOKENS, predictor_features, second_key
from offramp.models.exits.head import ExitHead
from offramp.models.exits.training.data import States
from offramp.models.transformer import Transformer

# Full-depth tokens outside the draft vocabulary have no probability at an exit; this stands in.
_LOWEST_LOG_PROB = -20.0
_CHUNK = 512
# Weak: four weights against thousands of positions, but agreement that is the same for all
# positions must not send them to infinity.
_L2 = 1e-4
# The floor may cost few of the tokens that the second key would be sure of.
_SURE = 0.9
_LOST_AT_FLOOR = 0.03


class Draft:
    """LM-head rows of the tokens ``vocab`` [v] (ids ascending; None: every token)."""

    def __init__(self, model: Transformer, vocab: Tensor | None) -> None:
        self.vocab = None if vocab is None else vocab.to(model.device)
        self.weight = model.head_rows(self.vocab).detach()
        self._eps = model.config.rms_norm_eps

    def logits(self, head: ExitHead, hidden: Tensor) -> Tensor:
        """Logits [n, v] in fp32 of ``head`` for exit states [n, d]."""
        states = hidden.to(self.weight.device, torch.float32)
        normed = head.normed(states, self._eps)
        return F.linear(normed.to(self.weight.dtype), self.weight).float()

    def tokens(self, places: Tensor) -> Tensor:
        """Token ids of places in the vocabulary."""
        return places if self.vocab is None else self.vocab[places]

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Places [n] of ``tokens`` [n], and whether they are in the vocabulary at all [n]."""
        if self.vocab is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        places = torch.searchsorted(self.vocab, tokens).clamp_max(len(self.vocab) - 1)
        return places, self.vocab[places] == tokens

    @torch.no_grad()
    def choices(self, head: ExitHead, hidden: Tensor, chunk: int = 512) -> Tensor:
        """The exit's own token ids [n], on the CPU, for exit states [n, d]."""
        parts = [
            self.tokens(self.logits(head, part).argmax(dim=-1)).cpu()
            for part in hidden.split(chunk)
        ]
        return torch.cat(parts)


def draft_vocab(
    labels: Tensor, always: tuple[int, ...], vocab_size: int, count: int
) -> Tensor | None:
    """Ids, ascending, of the ``count`` most frequent of ``labels`` [n] and of ``always``.

    Tokens that occur equally often, or never, come in order of their ids: byte-pair encodings
    number tokens by falling frequency. None, meaning all tokens, if ``count`` is 0 or would not
    reduce anything.
    """
    if count == 0 or count >= vocab_size:
        return None
    counts = torch.bincount(labels, minlength=vocab_size)
    # The predictor looks at a few candidates, so there must be as many.
    keep = max(count, PREDICTOR_TOKENS)
    ranked = counts.sort(descending=True, stable=True).indices[:keep]
    ids: Tensor = torch.cat((ranked, torch.tensor(always, dtype=torch.long))).unique()
    return ids


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one exit predicts at n positions, over the draft vocabulary.

    ``agrees`` [n] whether its token is the full-depth token, ``log_prob`` [n] its log-probability
    of that token (nats), ``best`` [n, 2] its two highest probabilities, ``features`` [n, 12] the
    predictor's inputs.
    """

    agrees: Tensor
    log_prob: Tensor
    best: Tensor
    features: Tensor


@torch.no_grad()
def predict(heads: Sequence[ExitHead], states: States, draft: Draft) -> list[Predictions]:
    """Predictions of each of ``heads`` (bottom up) at all positions."""
    chunks: list[list[tuple[Tensor, ...]]] = [[] for _ in heads]
    for index in torch.arange(len(states.labels)).split(_CHUNK):
        earlier: Tensor | None = None
        places, known = draft.places(states.labels[index].to(draft.weight.device))
        for head, own in zip(heads, chunks, strict=True):
            logits = draft.logits(head, states.at[head.layer][index])
            before = torch.zeros_like(logits) if earlier is None else earlier
            log_probs = logits.log_softmax(dim=-1)
            label = log_probs.gather(1, places.unsqueeze(1)).squeeze(1)
            label = label.clamp_min(_LOWEST_LOG_PROB).masked_fill(~known, _LOWEST_LOG_PROB)
            agrees = (logits.argmax(dim=-1) == places) & known
            best = log_probs.topk(2, dim=-1).values.exp()
            features = predictor_features(logits, before)
            own.append((agrees.cpu(), label.cpu(), best.cpu(), features.cpu()))
            earlier = logits
    return [Predictions(*map(torch.cat, zip(*own, strict=True))) for own in chunks]


@torch.no_grad()
def full_log_prob(model: Transformer, states: States) -> Tensor:
    """Log-probabilities [n] (nats), on the CPU, that the full depth gives its own choices."""
    device, dtype = model.device, model.dtype
    parts = []
    for index in torch.arange(len(states.labels)).split(_CHUNK // 2):
        logits = model.logits(states.top[index].to(device, dtype))
        labels = states.labels[index].to(device).unsqueeze(1)
        parts.append(logits.log_softmax(dim=-1).gather(1, labels).squeeze(1).cpu())
    return torch.cat(parts)


def fit_fuse(gate: Tensor, best: Tensor, agrees: Tensor) -> Tensor:
    """Weights [4] of the second key, rounded to what an exit file stores.

    Logistic regression of ``agrees`` [n] on ``gate`` scores [n] and the exit's two ``best``
    probabilities [n, 2], by L-BFGS in float64. The positions must not be those of the gate's
    training, whose scores are too sure of them.
    """
    fuse = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    scores, probs, target = gate.double(), best.double(), agrees.double()
    optimizer = torch.optim.LBFGS([fuse], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        own = second_key(fuse, scores, probs)
        loss = F.binary_cross_entropy(own, target) + _L2 * fuse.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return fuse.detach().half().float()


def floor_for(gate: Tensor, second: Tensor) -> float:
    """Gate score below which only 3 % of the tokens lie that the second key is sure of.

    ``gate`` and ``second`` [n] are the scores of both keys; sure is 0.9. 0.0 if there are none.
    """
    sure = gate[second >= _SURE].sort().values
    if not len(sure):
        return 0.0
    return float(sure[int(_LOST_AT_FLOOR * len(sure))])


def two_key_scores(head: ExitHead, gate: Tensor, best: Tensor) -> Tensor:
    """Scores [n] of `criteria.TwoKey` from ``gate`` scores [n] and ``best`` two probabilities."""
    fuse = None if head.fuse is None else head.fuse.to(gate.device)
    return second_key(fuse, gate, best).masked_fill(gate < head.floor, 0.0)
