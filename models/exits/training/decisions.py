"""Training heads that answer questions early, and calibrating when they may.

Heads are linear, so they are fitted, not trained: seconds for thousands of prompts, once the states
along the prompts have been collected in one pass at full depth.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.decoder import Taps
from offramp.kernels.rows import HostRows, Span
from offramp.models.exits.calibration import betting_p_value, fixed_sequence
from offramp.models.exits.decision_heads import DecisionHeads, features
from offramp.models.exits.points import DecisionPoint
from offramp.models.kv_cache import KVCache
from offramp.models.transformer import Transformer

_ROWS = 2048
_CONFIDENCE = 0.95
QUALITIES = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
# Probabilities to leave at, careful first. Fixed beforehand, as fixed-sequence testing wants.
_LADDER = (
    *(0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9),
    *(0.88, 0.85, 0.82, 0.79, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5),
)
_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)
_STEPS = 60
_SCALES = tuple(round(0.02 * 1.1**step, 4) for step in range(50))


@dataclass(frozen=True, slots=True)
class PromptStates:
    """States of n prompts after k layers: of the last position and the mean, fp16 [n, k, d].

    ``final`` [n, d] is the last position's at full depth, normalised for the LM head.
    """

    layers: tuple[int, ...]
    last: Tensor
    mean: Tensor
    final: Tensor

    def features(self, place: int, eps: float) -> Tensor:
        """What a head after the layer at ``place`` reads, fp32 [n, 2 d]."""
        return features(self.last[:, place].float(), self.mean[:, place].float(), eps)

    def select(self, rows: Tensor) -> PromptStates:
        """Those of some of the prompts."""
        return PromptStates(self.layers, self.last[rows], self.mean[rows], self.final[rows])


@torch.inference_mode()
def collect_states(
    model: Transformer,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    progress: Callable[[int], None],
) -> PromptStates:
    """Run every prompt at full depth; ``progress`` is called with the number done.

    ``cache`` has room for the longest prompt, and nothing in it that is still needed.
    """
    config, size = model.config, cache.block_size
    slots = torch.full((config.num_layers,), -1, dtype=torch.int32)
    slots[torch.tensor(layers) - 1] = torch.arange(len(layers), dtype=torch.int32)
    longest = max(map(len, prompts))
    states = torch.zeros(max(_ROWS, longest), len(layers), config.hidden_size)
    shape = (len(prompts), len(layers), config.hidden_size)
    last, mean = (torch.empty(shape, dtype=torch.float16) for _ in range(2))
    final = torch.empty(len(prompts), config.hidden_size)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    room = min(_ROWS, cache.num_blocks * size // 2)
    done = 0
    while done < len(order):
        group: list[int] = []
        spans: list[Span] = []
        blocks = rows = 0
        while done < len(order) and (not group or rows + len(prompts[order[done]]) <= room):
            count = len(prompts[order[done]])
            table = range(blocks, blocks + -(-count // size))
            spans.append(Span(range(count), table))
            group.append(order[done])
            blocks, rows, done = table.stop, rows + count, done + 1
        where = HostRows(spans, size, model.rotary, model.device)
        taps = Taps(states, array("q", range(rows)), slots)
        hidden = model.embed(torch.tensor([token for i in group for token in prompts[i]]))
        for segment in model.segments:
            hidden = segment(hidden, where, cache, taps)
        start = 0
        for index, span in zip(group, spans, strict=True):
            own = states[start : start + len(span.positions)]
            last[index], mean[index] = own[-1], own.mean(0)
            start += len(span.positions)
            final[index] = model.normed(hidden[start - 1 : start])[0]
        progress(done)
    return PromptStates(tuple(layers), last, mean, final)


def fit_task(states: PromptStates, answers: Tensor, classes: int, eps: float) -> DecisionHeads:
    """Logistic regressions for ``answers`` [n] in 0 .. classes - 1, one after each layer.

    The weight decay of each is chosen on a fifth of the prompts that is kept from it meanwhile.
    """
    aside = torch.arange(len(answers)) % 5 == 0
    weights, biases = [], []
    for place in range(len(states.layers)):
        read = states.features(place, eps)
        losses = []
        for decay in _DECAYS:
            weight, bias = _logistic(read[~aside], answers[~aside], classes, decay)
            logits = torch.addmm(bias, read[aside], weight.T)
            losses.append(float(F.cross_entropy(logits, answers[aside])))
        best = _DECAYS[min(range(len(losses)), key=losses.__getitem__)]
        weight, bias = _logistic(read, answers, classes, best)
        weights.append(weight)
        biases.append(bias)
    return DecisionHeads(states.layers, torch.stack(weights), torch.stack(biases))


def _logistic(read: Tensor, answers: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, read.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits = torch.addmm(bias, read, weight.T)
        value = F.cross_entropy(logits, answers) + decay * weight.square().sum()
        value.backward()
        return value

    search.step(loss)
    return weight.detach(), bias.detach()


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers of n held-out prompts after k layers and at full depth.

    ``answers`` [k, n] and their ``chances`` [k, n]; ``full`` [n] at full depth, and the ``truth``
    [n] where there are labels.
    """

    layers: tuple[int, ...]
    num_layers: int
    answers: Tensor
    chances: Tensor
    full: Tensor
    truth: Tensor | None = None

    def leave(self, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Answers [n] and layers [n] of those who leave where their chance reaches the bound."""
        answers, depth = self.full.clone(), torch.full_like(self.full, self.num_layers)
        inside = torch.ones_like(self.full, dtype=torch.bool)
        for place, bound in enumerate(thresholds):
            going = inside & (self.chances[place] >= bound)
            answers[going] = self.answers[place, going]
            depth[going] = self.layers[place]
            inside &= ~going
        return answers, depth

    def losses(self, thresholds: Sequence[float]) -> Tensor:
        """What leaving costs [n], 0 to 1, where 1/2 is nothing if there is a truth, else 0.

        With a truth a wrong answer counts where full depth was right, and is made up for by a right
        one where full depth was wrong; without, every answer that is not full depth's counts.
        """
        answers, _ = self.leave(thresholds)
        if self.truth is None:
            return (answers != self.full).float()
        net = (answers != self.truth).float() - (self.full != self.truth).float()
        return (net + 1) / 2


def judge_task(
    heads: DecisionHeads, states: PromptStates, eps: float, answers: Tensor, *, labelled: bool
) -> Judged:
    """Let a task's heads answer held-out prompts.

    ``answers`` [n] are the labels; without labels, the model's own at full depth.
    """
    found = [
        torch.addmm(heads.bias[place], states.features(place, eps), heads.weight[place].T)
        for place in range(len(heads.layers))
    ]
    chances, given = torch.stack([logits.softmax(1) for logits in found]).max(dim=2)
    *layers, top = heads.layers
    full, truth = (given[-1], answers) if labelled else (answers, None)
    return Judged(tuple(layers), top, given[:-1], chances[:-1], full, truth)


def fit_scale(heads: DecisionHeads, states: PromptStates, eps: float, chances: Tensor) -> float:
    """The factor that brings the heads' distributions closest to ``chances`` [n, answers].

    By the cross-entropy over all layers below full depth.
    """
    found = torch.stack(
        [
            torch.addmm(heads.bias[place], states.features(place, eps), heads.weight[place].T)
            for place in range(len(heads.layers) - 1)
        ]
    )
    losses = [float(-(chances * (scale * found).log_softmax(2)).sum(2).mean()) for scale in _SCALES]
    return _SCALES[min(range(len(losses)), key=losses.__getitem__)]


def calibrate(judged: Judged, held_out: Judged) -> tuple[DecisionPoint, ...]:
    """Operating points whose promise ``judged`` shows with 95 % confidence (Learn then Test).

    What they reached is reported on ``held_out``, which decides nothing. A quality that cannot be
    shown has no point.
    """
    points = []
    count = len(judged.layers)
    for quality in QUALITIES:
        risk = 1 - quality if judged.truth is None else 1 - quality / 2
        p_values = [
            betting_p_value(judged.losses((bound,) * count).double().numpy(), risk)
            for bound in _LADDER
        ]
        passed = fixed_sequence(p_values, 1 - _CONFIDENCE)
        if not passed:
            continue
        thresholds = (_LADDER[passed - 1],) * count
        answers, depth = held_out.leave(thresholds)
        agreement = float((answers == held_out.full).float().mean())
        points.append(DecisionPoint(quality, thresholds, agreement, float(depth.float().mean())))
    return tuple(points)
