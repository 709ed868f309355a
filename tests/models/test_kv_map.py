"""Maps from the exit state to the skipped layers' K,V."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp.kernels.rms_norm import rms_norm
from offramp.models.exits.file import ExitFile, load_exits
from offramp.models.exits.training.data import Answer, lay_out
from offramp.models.exits.training.train import TrainOptions, fit_kv_maps, new_head
from offramp.models.families import config_from_hf
from offramp.models.kv_cache import KVCache
from offramp.models.loading.safetensors import load_weights
from offramp.models.runner import Runner
from offramp.models.sampling_params import KVFill
from offramp.models.step import FillKV, OwedRows
from offramp.models.transformer import Transformer, identity_projection

EXIT = 2


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> Transformer:
    config = config_from_hf(tiny_dir)
    return Transformer(config, load_weights(tiny_dir, config, dtype=torch.float32), (EXIT,), 64)


def answers(seed: int, count: int) -> list[Answer]:
    """Random prompts with random answers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (count, 40), generator=generator).tolist()
    return [Answer(tuple(row[:4]), tuple(row[4:])) for row in ids]


@torch.inference_mode()
def exit_and_true_kv(model: Transformer, items: list[Answer]) -> tuple[Tensor, Tensor]:
    """Normalised exit states and the K,V the layers above really compute."""
    layout = lay_out(model, list(enumerate(items)))
    hidden, above = layout.hidden, []
    state = hidden
    for layer in model.layers:
        if layer.index == EXIT:
            state = hidden[layout.rows]
        if layer.index >= EXIT:
            x = rms_norm(hidden[layout.rows], layer.attn_norm, model.config.rms_norm_eps)
            above.append(layer.qkv(x)[:, model.config.query_size :])
        hidden = layer(hidden, layout.at.table, layout.cache)
    return rms_norm(state, None, model.config.rms_norm_eps), torch.cat(above, dim=1)


def test_the_map_is_closer_to_the_true_kv_than_the_identity(model: Transformer) -> None:
    """On answers it was not fitted to."""
    weight, bias = fit_kv_maps(model, answers(0, 120))[EXIT]
    x, true = exit_and_true_kv(model, answers(1, 30))
    identity, own_bias = identity_projection(model, EXIT)
    assert weight.shape == identity.shape
    mapped_error = (x @ weight.t() + bias - true).norm() / true.norm()
    assert own_bias is None
    assert mapped_error < 0.9 * ((x @ identity.t() - true).norm() / true.norm())


def test_the_runner_fills_with_the_map_of_the_file(model: Transformer, tmp_path: Path) -> None:
    """Saved, loaded and used: V in the pages is what the map says."""
    config = model.config
    weight, bias = fit_kv_maps(model, answers(0, 20))[EXIT]
    head = replace(new_head(EXIT, model, TrainOptions(width=8, router=4)), kv_map=weight)
    head = replace(head, kv_bias=bias)
    ExitFile("a" * 32, (head,), {}, {}).save(tmp_path / "exits.safetensors")
    loaded = load_exits(
        tmp_path / "exits.safetensors",
        fingerprint="a" * 32,
        hidden_size=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache = KVCache(config, 4, 8, torch.float32, torch.device("cpu"))
    runner = Runner(model, loaded.heads, cache, 4)
    runner.hidden.normal_(generator=torch.Generator().manual_seed(3))
    runner.run(FillKV(KVFill.PROJECT, (OwedRows(1, (9,), (2,), [3, 1]),)))
    expected = rms_norm(runner.hidden[2], None, config.rms_norm_eps) @ weight.half().float().t()
    expected = (expected + bias.half().float()).view(-1, 2, config.num_kv_heads, config.head_dim)
    for index, layer in enumerate(range(EXIT, config.num_layers)):
        torch.testing.assert_close(cache.layers[layer][1][9], expected[index, 1])
