"""Train exit heads on a frozen backbone, distilled from its own full-depth output.

An exit's adapter learns to give the LM head what the full stack would have given it (KL to the
full-depth distribution plus cross-entropy on its choice). Its gate then learns, on answers the
adapter has not seen, whether to leave: either how far leaving is to be preferred to going on
(ADEPT, arXiv 2601.03700), or plainly whether the exit's token is the full-depth token.

K and V of the skipped layers are linear in each layer's normalised input, so a linear map from the
exit state makes them in one product. ADEPT learns a map of the hidden state instead. Here the map
is fitted in closed form, as a ridge correction of the identity map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.kernels.rms_norm import rms_norm
from offramp.models.exits.head import ADAPTER, GATE, PREDICTOR, ExitHead
from offramp.models.exits.training.data import Answer, States, batches, lay_out
from offramp.models.exits.training.second_key import Draft
from offramp.models.transformer import Transformer, identity_projection

Report = Callable[[str, int, int, float], None]
"""Called with what is being trained, steps done, steps in all and the loss."""


# Positions on which each epoch of an adapter is judged: the error of a share is below 0.8 %.
_HELD_OUT = 4096
_PREDICTOR_WIDTH = 32
# Ridge strength relative to the inputs' mean power: small against tens of thousands of tokens, and
# enough to keep directions that hardly occur at the identity map.
_RIDGE = 1e-3


class Objective(StrEnum):
    """What a gate learns: see `preference_targets`, or agreement as such."""

    PREFERENCE = "preference"
    AGREEMENT = "agreement"


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Sizes and schedule.

    ``width`` is the adapter's inner width, ``router`` the gate's, ``vocab`` the number of tokens
    the exits tell apart (0: all). ``vocab_sample`` tokens stand for the vocabulary in each step's
    softmax: the most frequent ones of the answers and the step's own labels. ``precision`` is what
    thresholds aim at, the share of leaving tokens that are right; ``threshold`` overrides it.
    ``preference_lambda`` weighs a token's log-probability (nats), ``preference_beta`` the depth
    (share of the stack).
    """

    width: int = 1024
    router: int = 256
    vocab: int = 8192
    epochs: int = 4
    gate_epochs: int = 12
    batch: int = 512
    lr: float = 1.5e-3
    vocab_sample: int = 6000
    objective: Objective = Objective.AGREEMENT
    preference_lambda: float = 4.0
    preference_beta: float = 1.0
    precision: float = 0.98
    threshold: float | None = None
    seed: int = 0


def new_head(layer: int, model: Transformer, options: TrainOptions) -> ExitHead:
    """An exit head that starts as the plain final norm: its MLP branch adds nothing yet."""
    return plain_head(layer, model.final_norm, options)


def plain_head(layer: int, norm: Tensor, options: TrainOptions) -> ExitHead:
    """As `new_head`, from the final norm's weight ``norm`` [d]."""
    d, device = len(norm), norm.device
    generator = torch.Generator().manual_seed(options.seed + layer)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(device)

    return ExitHead(
        layer=layer,
        threshold=1.0,
        scale=torch.ones(d, device=device),
        gate_up=normal(2 * options.width, d),
        down=torch.zeros(d, options.width, device=device),
        norm=norm.detach().clone().float(),
        router_up=normal(options.router, d),
        router_up_bias=torch.zeros(options.router, device=device),
        router_down=torch.zeros(1, options.router, device=device),
        router_down_bias=torch.zeros(1, device=device),
    )


def train_adapter(
    head: ExitHead,
    model: Transformer,
    states: States,
    options: TrainOptions,
    report: Report,
    held_out: tuple[States, Draft],
) -> list[dict[str, Any]]:
    """Fit the adapter in place.

    The result lists, before training and after every epoch, ``epoch``, ``agreement`` (share of
    tokens, over the draft vocabulary) and ``loss`` (nats) on the positions of ``held_out``.
    """
    frequent = _frequent(states.labels, model.config.vocab_size, options.vocab_sample)
    curve: list[dict[str, Any]] = []
    judged, draft = held_out[0].sample(_HELD_OUT), held_out[1]
    lm_head = model.lm_head.weight.detach().bfloat16()

    @torch.no_grad()
    def note(epoch: int) -> None:
        right = draft.choices(head, judged.at[head.layer]) == judged.labels
        parts = torch.arange(len(judged.labels)).split(options.batch)
        losses = [len(part) * float(of_held_out(part)) for part in parts]
        values = float(right.double().mean()), sum(losses) / len(judged.labels)
        curve.append(
            {"epoch": epoch, "agreement": round(values[0], 4), "loss": round(values[1], 4)}
        )

    loss = _distillation(head, model, lm_head, states, frequent)
    of_held_out = _distillation(head, model, lm_head, judged, frequent)
    params = [getattr(head, name) for name in ADAPTER]
    name = f"exit {head.layer} adapter"
    note(0)
    _fit(name, params, len(states.labels), loss, options, options.epochs, report, note)
    return curve


def _distillation(
    head: ExitHead, model: Transformer, lm_head: Tensor, states: States, frequent: Tensor
) -> Callable[[Tensor], Tensor]:
    """Loss (nats) of the adapter on the positions with given indices."""
    hidden, eps, device = states.at[head.layer], model.config.rms_norm_eps, lm_head.device

    def loss(index: Tensor) -> Tensor:
        labels = states.labels[index]
        vocab = torch.cat((frequent, labels)).unique()
        rows = lm_head[vocab.to(device)]
        # The two products with the vocabulary are nearly all the work; bf16 halves them or better
        # where the processor has it, and the softmax stays in fp32.
        own = hidden[index].to(device, torch.float32)
        student = head.normed(own, eps).bfloat16() @ rows.t()
        teacher = states.top[index].to(device, torch.bfloat16) @ rows.t()
        log_p = student.float().log_softmax(dim=-1)
        kl = F.kl_div(log_p, teacher.float().softmax(dim=-1), reduction="batchmean")
        return kl + 0.5 * F.nll_loss(log_p, torch.searchsorted(vocab, labels).to(device))

    return loss


def train_gate(
    head: ExitHead,
    target: Tensor,
    states: States,
    options: TrainOptions,
    report: Report,
    eps: float,
) -> None:
    """Fit the gate in place to ``target`` [n]: the wanted score of each position, 0 to 1."""
    params = [getattr(head, name) for name in GATE]
    hidden, device = states.at[head.layer], head.scale.device

    def loss(index: Tensor) -> Tensor:
        score = head.score(hidden[index].to(device, torch.float32), eps)
        return F.binary_cross_entropy(score, target[index].to(device, torch.float32))

    _fit(f"exit {head.layer} gate", params, len(hidden), loss, options, options.gate_epochs, report)


def preference_targets(log_probs: Tensor, depths: Tensor, *, weight: float, cost: float) -> Tensor:
    """How far leaving now is to be preferred to the best later exit, 0 to 1: [exits, n].

    ``log_probs`` [exits + 1, n] are the log-probabilities T that each exit, and last the full
    depth, give the full-depth token; ``depths`` [exits + 1] are their shares C of the stack. With
    utility U = ``weight`` * T - ``cost`` * C the target is sigmoid(U - best later U): the
    Bradley-Terry form of ADEPT's preference (arXiv 2601.03700).
    """
    utility = weight * log_probs - cost * depths.unsqueeze(1)
    best_from = utility.flip(0).cummax(dim=0).values.flip(0)
    return torch.sigmoid(utility[:-1] - best_from[1:])


@torch.no_grad()
def exit_scores(head: ExitHead, hidden: Tensor, eps: float) -> Tensor:
    """Gate scores [n], on the CPU, of exit states [n, d]."""
    device = head.scale.device
    parts = [head.score(p.to(device, torch.float32), eps).cpu() for p in hidden.split(4096)]
    return torch.cat(parts)


def threshold_for(scores: Tensor, agrees: Tensor, precision: float) -> tuple[float, float]:
    """Lowest threshold at which the tokens that leave are right at ``precision`` or better.

    Returns it with the share of tokens that leave; (1.01, 0.0) if no threshold does.
    """
    ranked, order = scores.sort(descending=True)
    right = agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    # A threshold cannot part tokens of one score: only the last of equals may be a bound.
    bound = torch.ones(len(order), dtype=torch.bool)
    bound[:-1] = ranked[:-1] != ranked[1:]
    good = ((right >= precision) & bound).nonzero()
    if not len(good):
        return 1.01, 0.0
    last = int(good[-1])
    return float(ranked[last]), (last + 1) / len(order)


def _frequent(labels: Tensor, vocab_size: int, count: int) -> Tensor:
    counts = torch.bincount(labels, minlength=vocab_size)
    return counts.topk(min(count, vocab_size)).indices


def fit_predictor(
    head: ExitHead, features: Tensor, agrees: Tensor, options: TrainOptions, report: Report
) -> ExitHead:
    """``head`` with SpecEE's predictor (arXiv 2504.08850) fitted to agreement.

    ``features`` [n, 12] are those of `criteria.predictor_features`, ``agrees`` [n] whether the
    exit's token is the full-depth token.
    """
    mean, spread = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-3)
    inputs, target = (features - mean) / spread, agrees.float()
    size = features.shape[1]
    generator = torch.Generator().manual_seed(options.seed + head.layer)
    up = torch.randn(_PREDICTOR_WIDTH, size, generator=generator) / math.sqrt(size)
    up_bias, down = torch.zeros(_PREDICTOR_WIDTH), torch.zeros(1, _PREDICTOR_WIDTH)
    params = [up, up_bias, down, torch.zeros(1)]

    def loss(index: Tensor) -> Tensor:
        inner = F.silu(F.linear(inputs[index], params[0], params[1]))
        score = torch.sigmoid(F.linear(inner, params[2], params[3])).squeeze(-1)
        return F.binary_cross_entropy(score, target[index])

    name = f"exit {head.layer} predictor"
    _fit(name, params, len(inputs), loss, options, options.gate_epochs, report)
    # Raw logits are far from unit scale; the standardisation becomes part of the first layer.
    scaled = params[0] / spread
    fitted = scaled, params[1] - scaled @ mean, params[2], params[3]
    placed: Any = {n: t.to(head.scale.device) for n, t in zip(PREDICTOR, fitted, strict=True)}
    return replace(head, **placed)


def _fit(
    name: str,
    params: list[Tensor],
    size: int,
    loss: Callable[[Tensor], Tensor],
    options: TrainOptions,
    epochs: int,
    report: Report,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """AdamW with a short warm-up and cosine decay over shuffled batches.

    ``after_epoch`` is called with the number of epochs done.
    """
    for param in params:
        param.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(options.seed)
    batches = -(-size // options.batch)
    total, done = batches * epochs, 0
    for epoch in range(epochs):
        for index in torch.randperm(size, generator=generator).split(options.batch):
            progress = done / total
            ramp = min(1.0, (done + 1) / 50)
            optimizer.param_groups[0]["lr"] = (
                options.lr * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
            optimizer.zero_grad(set_to_none=True)
            value = loss(index)
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            done += 1
            if done % 20 == 0 or done == total:
                report(name, done, total, float(value.detach()))
        if after_epoch is not None:
            after_epoch(epoch + 1)
    for param in params:
        param.requires_grad_(False)


class _Normal:
    """Normal equations of one exit's map: inputs against residuals of the identity map."""

    def __init__(self, model: Transformer, first: int) -> None:
        self.weight, self.bias = identity_projection(model, first)
        d = model.config.hidden_size
        self.xx = torch.zeros(d + 1, d + 1, dtype=torch.float64)
        self.xy = torch.zeros(d + 1, self.weight.shape[0], dtype=torch.float64)

    def add(self, x: Tensor, kv: Tensor) -> None:
        """Learn from ``x`` [n, d] and the true K,V ``kv`` [n, layers * 2 * kv_size]."""
        residual = kv - F.linear(x, self.weight, self.bias)
        inputs = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
        self.xx += (inputs.t() @ inputs).double().cpu()
        self.xy += (inputs.t() @ residual).double().cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the map."""
        ridge = _RIDGE * self.xx.diagonal().mean()
        eye = torch.eye(len(self.xx), dtype=torch.float64)
        correction = torch.linalg.solve(self.xx + ridge * eye, self.xy).to(self.weight)
        bias = correction[-1] if self.bias is None else self.bias + correction[-1]
        return self.weight + correction[:-1].t(), bias


@torch.inference_mode()
def fit_kv_maps(
    model: Transformer, answers: Sequence[Answer], progress: Callable[[int], None] | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Weight [layers * 2 * kv_size, d] and bias of the map of each exit layer of ``model``.

    Targets are K (before its norm and rotation) and V of the skipped layers at the positions that
    make answer tokens, teacher-forced. ``progress`` is called with the number of answers done.
    """
    normal = {layer: _Normal(model, layer) for layer in model.exit_layers}
    done = 0
    for batch in batches(answers, range(len(answers))):
        _accumulate(model, [(i, answers[i]) for i in batch], normal)
        done += len(batch)
        if progress is not None:
            progress(done)
    return {layer: equations.solve() for layer, equations in normal.items()}


def _accumulate(
    model: Transformer, batch: Sequence[tuple[int, Answer]], normal: dict[int, _Normal]
) -> None:
    eps, start = model.config.rms_norm_eps, model.config.query_size
    layout = lay_out(model, batch)
    hidden = layout.hidden
    states: dict[int, Tensor] = {}
    kv: dict[int, Tensor] = {}
    for layer in model.layers:
        if layer.index >= model.exit_layers[0]:
            states[layer.index] = hidden[layout.rows]
            kv[layer.index] = layer.qkv(rms_norm(states[layer.index], layer.attn_norm, eps))[
                :, start:
            ]
        hidden = layer(hidden, layout.at.table, layout.cache)
    for first, equations in normal.items():
        above = torch.cat([kv[index] for index in sorted(kv) if index >= first], dim=1)
        equations.add(rms_norm(states[first], None, eps), above)
