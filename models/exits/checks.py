"""Exit checks: which rows may leave at an exit point, and with which token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.kernels.exit_check import CheckedRows, CheckMatrices, NativeCheck
from offramp.kernels.exit_gate import fused_score
from offramp.kernels.linear import Linear
from offramp.models.exits.criteria import CRITERIA, ExitView, Trail
from offramp.models.exits.head import ExitHead, PackedHead
from offramp.models.sampler import sample, sample_with_logprobs
from offramp.models.sampling_params import DEFAULT_CRITERION, ExitCriterion
from offramp.models.step import HeadRow, SequenceRows, TokenLogprobs
from offramp.models.transformer import Transformer


class Exits:
    """All exit heads of a model with the LM head they share.

    With ``vocab`` (ascending token ids) exits tell only those tokens apart: on a small model the
    whole LM head costs as much as several layers, and nearly all tokens that leave are frequent.
    """

    def __init__(
        self, model: Transformer, heads: Sequence[ExitHead], num_rows: int, vocab: Tensor | None
    ) -> None:
        self.model = model
        self.heads = tuple(PackedHead.of(head, model.exit_forms) for head in heads)
        self.eps = model.config.rms_norm_eps
        self.vocab = vocab
        self.trail = Trail(num_rows, model.device)
        self.lm_head = model.lm_head
        if vocab is not None:
            rows = model.head_rows(vocab)
            self.lm_head = Linear(rows, None, model.exit_forms)
        self._natives = tuple(
            NativeCheck.of(head, CheckMatrices(**head.products, lm_head=self.lm_head), self.eps)
            for head in self.heads
        )

    def token(self, place: int) -> int:
        """The token at a place of the exits' own vocabulary."""
        return place if self.vocab is None else int(self.vocab[place])

    def logits(self, point: int, hidden: Tensor) -> Tensor:
        """Logits [n, vocab] (fp32) of exit states [n, d] over the exits' own vocabulary."""
        return self.lm_head(self.heads[point].normed(hidden, self.eps)).float()

    def all_logits(self, point: int, hidden: Tensor) -> Tensor:
        """Logits [n, model's vocab] (fp32) of exit states [n, d]."""
        return self.model.logits(self.heads[point].normed(hidden, self.eps))

    def view(
        self,
        point: int,
        hidden: Tensor,
        rows: Tensor,
        at: Sequence[int],
        criterion: ExitCriterion,
    ) -> ExitView | NativeView:
        """What ``criterion`` sees of the states ``at`` some places of ``hidden`` [T, d].

        ``rows`` [T] are their hidden rows.
        """
        native = self._natives[point]
        if native is not None and criterion is DEFAULT_CRITERION:
            return NativeView(self.heads[point].fuse, hidden, at, native(hidden, at))
        index = torch.tensor(at, device=hidden.device)
        return ExitView(
            self.heads[point],
            hidden[index],
            lambda states: self.logits(point, states),
            eps=self.eps,
            index=point,
            num_exits=len(self.heads),
            rows=rows[index],
            trail=self.trail,
        )


class NativeView:
    """n rows at an exit point that the C kernels have checked by the default criterion."""

    def __init__(
        self, fuse: Tensor | None, hidden: Tensor, at: Sequence[int], checked: CheckedRows
    ) -> None:
        self._fuse = None if fuse is None else fuse.tolist()
        self._states = hidden
        self._at = at
        self._checked = checked

    @property
    def hidden(self) -> Tensor:
        """The rows' states [n, d]."""
        return self._states[torch.tensor(self._at)]

    @property
    def num_logits(self) -> int:
        """Rows whose logits were made."""
        return len(self._checked.fired)

    def logits(self, at: Tensor) -> Tensor:
        """The exit's logits [len(at), vocab] of the rows with indices ``at``, which all fired."""
        place = {row: index for index, row in enumerate(self._checked.fired)}
        return self._checked.logits[[place[row] for row in at.tolist()]]

    def best(self, index: int) -> int:
        """The likeliest token of a row that fired, by its place in the exit's vocabulary."""
        return self._checked.best[index]

    def scores(self) -> list[float]:
        """As TwoKey has them."""
        found, seen = [0.0] * len(self._at), self._checked
        for row in seen.fired:
            gap = seen.tops[row] - seen.seconds[row]
            found[row] = fused_score(self._fuse, seen.gates[row], seen.tops[row], gap)
        return found


@dataclass(frozen=True, slots=True)
class Checked:
    """For each sequence the exit's token if it may leave, and the score if it was checked.

    ``logprobs`` are of the tokens, where they are wanted; empty if they nowhere are.
    """

    tokens: tuple[int | None, ...]
    scores: tuple[float | None, ...]
    head_rows: int
    logprobs: tuple[TokenLogprobs | None, ...] = ()


def check_sequences(
    exits: Exits, point: int, hidden: Tensor, rows: Tensor, work: Sequence[SequenceRows]
) -> Checked:
    """Score the last row of each sequence with a check; ``hidden`` [T, d], ``rows`` [T] of all."""
    last: dict[ExitCriterion, list[tuple[int, int]]] = {}
    end = 0
    for index, item in enumerate(work):
        end += len(item.rows)
        if item.check is not None:
            last.setdefault(item.check.criterion, []).append((index, end - 1))
    tokens: list[int | None] = [None] * len(work)
    scores: list[float | None] = [None] * len(work)
    logprobs: dict[int, TokenLogprobs] = {}
    head_rows = 0
    for criterion, checked in last.items():
        view = exits.view(point, hidden, rows, [row for _, row in checked], criterion)
        if isinstance(view, NativeView):
            found = view.scores()
        else:
            found = CRITERIA[criterion].score(view).tolist()
        leaving: list[tuple[int, HeadRow]] = []
        for position, (index, _) in enumerate(checked):
            check = work[index].check
            assert check is not None
            scores[index] = found[position]
            if found[position] >= check.threshold:
                leaving.append((position, check.head))
        chosen, found_logprobs = _choose(exits, point, view, leaving)
        for number, (position, _) in enumerate(leaving):
            index = checked[position][0]
            tokens[index] = chosen[number]
            own = found_logprobs[number] if found_logprobs else None
            if own is not None:
                logprobs[index] = own
        head_rows += view.num_logits
    given = tuple(logprobs.get(index) for index in range(len(work))) if logprobs else ()
    return Checked(tuple(tokens), tuple(scores), head_rows, given)


def prompt_leavers(
    exits: Exits, point: int, hidden: Tensor, work: Sequence[SequenceRows]
) -> tuple[tuple[int, ...], ...]:
    """For each sequence the indices of prompt rows whose gate score reaches its prompt threshold.

    Prompt tokens need no token of their own, so the gate alone decides (ADEPT, arXiv 2601.03700).
    Empty when no prompt rows may leave.
    """
    if all(item.prompt_threshold is None for item in work):
        return ()
    left: list[tuple[int, ...]] = []
    first = 0
    for item in work:
        gone: tuple[int, ...] = ()
        if item.prompt_threshold is not None and item.prompt_rows:
            states = hidden[first : first + item.prompt_rows]
            fired = exits.heads[point].score(states, exits.eps) >= item.prompt_threshold
            gone = tuple(fired.nonzero().squeeze(-1).tolist())
        left.append(gone)
        first += len(item.rows)
    return tuple(left)


def _choose(
    exits: Exits,
    point: int,
    view: ExitView | NativeView,
    leaving: Sequence[tuple[int, HeadRow]],
) -> tuple[list[int], tuple[TokenLogprobs | None, ...]]:
    """The exit's token for each leaving row, with log-probabilities where they are wanted."""
    if not leaving:
        return [], ()
    heads = [head for _, head in leaving]
    if isinstance(view, NativeView) and all(head.is_greedy for head in heads):
        places = [view.best(position) for position, _ in leaving]
        return [exits.token(place) for place in places], ()
    at = torch.tensor([position for position, _ in leaving], device=view.hidden.device)
    if exits.vocab is None:
        return sample_with_logprobs(view.logits(at).clone(), heads)
    # Biases, penalties, masks and log-probabilities are of the whole vocabulary.
    if any(head.adjusts_logits or head.sampling.logprobs is not None for head in heads):
        return sample_with_logprobs(exits.all_logits(point, view.hidden[at]), heads)
    places = sample(view.logits(at).clone(), heads, ids=exits.vocab)
    chosen: list[int] = exits.vocab[torch.tensor(places, device=at.device)].tolist()
    return chosen, ()
