"""The LM head reduced to a frequent vocabulary, over which the exits draft their tokens.

Few tokens make up nearly all text, and on a small model the LM head costs as much as several
layers; FR-Spec (arXiv 2502.14856) reduces a drafter's head the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exits.criteria import PREDICTOR_TOKENS
from offramp.models.exits.head import ExitHead
from offramp.models.transformer import Transformer


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
