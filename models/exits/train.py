"""Train exit heads on a frozen backbone, distilled from its own full-depth output.

An exit's adapter learns to give the LM head what the full stack would have given it (KL to the
full-depth distribution plus cross-entropy on its choice). Its gate then learns, on answers the
adapter has not seen, whether the exit's token is the full-depth token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.models.exit_head import ExitHead
from offramp.models.exits.states import States
from offramp.models.transformer import Transformer

Report = Callable[[str, int, int, float], None]
"""Called with what is being trained, steps done, steps in all and the loss."""


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Sizes and schedule.

    ``width`` is the adapter's inner width, ``router`` the gate's. ``vocab_sample`` tokens stand for
    the vocabulary in each step's softmax: the most frequent ones of the answers and the step's own
    labels.
    """

    width: int = 1024
    router: int = 256
    epochs: int = 4
    gate_epochs: int = 12
    batch: int = 512
    lr: float = 1.5e-3
    vocab_sample: int = 6000
    precision: float = 0.98
    threshold: float | None = None
    seed: int = 0


def new_head(layer: int, model: Transformer, options: TrainOptions) -> ExitHead:
    """An exit head that starts as the plain final norm: its MLP branch adds nothing yet."""
    d = model.config.hidden_size
    generator = torch.Generator().manual_seed(options.seed + layer)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    return ExitHead(
        layer=layer,
        threshold=1.0,
        scale=torch.ones(d),
        gate_up=normal(2 * options.width, d),
        down=torch.zeros(d, options.width),
        norm=model.final_norm.detach().clone().float(),
        router_up=normal(options.router, d),
        router_up_bias=torch.zeros(options.router),
        router_down=torch.zeros(1, options.router),
        router_down_bias=torch.zeros(1),
    )


def train_adapter(
    head: ExitHead, model: Transformer, states: States, options: TrainOptions, report: Report
) -> None:
    """Fit the adapter in place."""
    params = [head.scale, head.gate_up, head.down, head.norm]
    hidden, eps = states.at[head.layer], model.config.rms_norm_eps
    lm_head = model.lm_head.weight.detach().bfloat16()
    frequent = _frequent(states.labels, model.config.vocab_size, options.vocab_sample)

    def loss(index: Tensor) -> Tensor:
        labels = states.labels[index]
        vocab = torch.cat((frequent, labels)).unique()
        rows = lm_head[vocab]
        # The two products with the vocabulary are nearly all the work; bf16 halves them or better
        # where the processor has it, and the softmax stays in fp32.
        student = head.normed(hidden[index].float(), eps).bfloat16() @ rows.t()
        teacher = states.top[index].bfloat16() @ rows.t()
        log_p = student.float().log_softmax(dim=-1)
        kl = F.kl_div(log_p, teacher.float().softmax(dim=-1), reduction="batchmean")
        return kl + 0.5 * F.nll_loss(log_p, torch.searchsorted(vocab, labels))

    _fit(f"exit {head.layer} adapter", params, len(hidden), loss, options, options.epochs, report)


def train_gate(
    head: ExitHead,
    agrees: Tensor,
    states: States,
    options: TrainOptions,
    report: Report,
    eps: float,
) -> None:
    """Fit the gate in place to ``agrees`` [n]: 1 where the exit's token is the full-depth token."""
    params = [head.router_up, head.router_up_bias, head.router_down, head.router_down_bias]
    hidden, target = states.at[head.layer], agrees.float()

    def loss(index: Tensor) -> Tensor:
        return F.binary_cross_entropy(head.score(hidden[index].float(), eps), target[index])

    _fit(f"exit {head.layer} gate", params, len(hidden), loss, options, options.gate_epochs, report)


@torch.inference_mode()
def exit_tokens(head: ExitHead, model: Transformer, hidden: Tensor) -> Tensor:
    """The exit's own choice [n] for exit states [n, d], over the whole vocabulary."""
    eps = model.config.rms_norm_eps
    parts = [
        model.logits(head.normed(part.float(), eps)).argmax(dim=-1) for part in hidden.split(512)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def exit_scores(head: ExitHead, hidden: Tensor, eps: float) -> Tensor:
    """Gate scores [n] of exit states [n, d]."""
    return torch.cat([head.score(part.float(), eps) for part in hidden.split(4096)])


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


def _fit(
    name: str,
    params: list[Tensor],
    size: int,
    loss: Callable[[Tensor], Tensor],
    options: TrainOptions,
    epochs: int,
    report: Report,
) -> None:
    """AdamW with a short warm-up and cosine decay over shuffled batches."""
    for param in params:
        param.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=options.lr, weight_decay=0.01, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(options.seed)
    batches = -(-size // options.batch)
    total, done = batches * epochs, 0
    for _ in range(epochs):
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
    for param in params:
        param.requires_grad_(False)
