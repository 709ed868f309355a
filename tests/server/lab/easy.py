"""A tiny model whose top layers change little, so that untrained exits are mostly right."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from offramp.models.exits.file import ExitFile
from offramp.models.exits.training.train import TrainOptions, new_head
from offramp.models.families import config_from_hf
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.transformer import Transformer

EXITS = (2, 3)
# What the branches of layers 2 and 3 are multiplied with.
_QUIET = {2: 0.2, 3: 0.1}
_BRANCHES = ("self_attn.o_proj", "mlp.down_proj")


def write_easy(tiny_dir: Path, folder: Path) -> Path:
    """A copy of the tiny model with quiet upper layers."""
    shutil.copytree(tiny_dir, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    for layer, factor in _QUIET.items():
        for branch in _BRANCHES:
            weights[f"model.layers.{layer}.{branch}.weight"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_exits(folder: Path, path: Path) -> Path:
    """Plain exits of the model in ``folder``; their second key is the gap of the two best."""
    shape = config_from_hf(folder)
    weights = load_weights(folder, shape, dtype=torch.float32)
    model = Transformer(shape, weights, EXITS, 64)
    options = TrainOptions(width=8, router=4)
    heads = tuple(new_head(layer, model, options) for layer in EXITS)
    ExitFile(fingerprint(weights), heads, {"kept": 1}, {"answers": 0}).save(path)
    return path


def write_prompts(path: Path, count: int) -> Path:
    """Different short prompts, one a line."""
    lines = [f"Tell {i} about {i * 7 % 61} and {i * 5 % 23}." for i in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
