"""Weight files, exit files, draft heads and decision heads that somebody spoilt."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import CheckpointError, ModelNotAvailable
from offramp.models.exits.decision_heads import DecisionFile, DecisionHeads, DecisionTask
from offramp.models.exits.draft_head import DraftFile, DraftHead, load_draft_head
from offramp.models.exits.file import ExitFile, ExitFileError, check_vocab, read_safetensors
from offramp.models.exits.head import shared_heads
from offramp.models.families import config_from_hf
from offramp.models.finite import is_finite
from offramp.models.loading.safetensors import fingerprint, load_weights
from offramp.models.loading.sources import resolve

from .hostile import Loader, copy_of, loader

WEIGHTS = "model.safetensors"
# Spoilt files of weights; of each kind of heads a quarter as many.
MUTATED = int(os.environ.get("FUZZ_FILES", "500"))
Header = dict[str, Any]


@pytest.fixture(scope="module")
def process() -> Iterator[Loader]:
    with loader() as made:
        yield made


@pytest.fixture
def folder(tiny_dir: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_dir, tmp_path / "model")


def parts(path: Path) -> tuple[Header, bytes]:
    """Header and data of a file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write(path: Path, header: str, data: bytes, length: int | None = None) -> None:
    text = header.encode()
    count = len(text) if length is None else length
    path.write_bytes((count % 2**64).to_bytes(8, "little") + text + data)


def test_values_that_are_no_numbers_are_refused_by_name(folder: Path) -> None:
    config = config_from_hf(folder)
    for name, value in (
        ("model.embed_tokens.weight", float("nan")),
        ("model.layers.2.mlp.up_proj.weight", float("inf")),
        ("model.norm.weight", float("-inf")),
    ):
        copy_of(folder, folder.parent / "spoilt")
        path = folder.parent / "spoilt" / WEIGHTS
        tensors = load_file(path)
        tensors[name].view(-1)[-1] = value
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{name} has values that are not numbers"):
            load_weights(folder.parent / "spoilt", config, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_value_that_is_no_number_is_found(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 1, 500, 1000):
            tensor = torch.randn(1001).to(dtype)
            assert is_finite(tensor)
            tensor[place] = value
            assert not is_finite(tensor)
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.arange(3))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, device, directory])
@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_what_is_no_plain_file_is_refused_at_once(
    process: Loader, folder: Path, name: str, make: Callable[[Path], None]
) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    said = process.refusal(folder)
    assert "no plain file" in said
    assert name in said


@pytest.mark.parametrize("make", [pipe, device, directory])
@pytest.mark.parametrize("option", ["exits", "draft_head", "decision_heads"])
def test_files_of_heads_are_plain_too(
    process: Loader, folder: Path, option: str, make: Callable[[Path], None]
) -> None:
    make(folder / "own.safetensors")
    assert "own.safetensors" in process.refusal(folder, **{option: str(folder / "own.safetensors")})


@pytest.mark.parametrize("make", [pipe, device, directory])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_folder_with_a_tokenizer_that_is_no_plain_file_is_refused(
    folder: Path, name: str, make: Callable[[Path], None]
) -> None:
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(ModelNotAvailable, match=f"{name} is no plain file"):
        resolve(str(folder))


def test_an_index_names_files_of_its_folder_only(process: Loader, folder: Path) -> None:
    for name in ("../other/model.safetensors", "/etc/passwd", "", "..", 7, None, "a\0b"):
        index = {"weight_map": {"model.norm.weight": name}}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index), encoding="utf-8")
        assert "not a valid index" in process.refusal(folder)


def crafted(header: Header, data: bytes) -> Iterator[tuple[str, bytes, int | None]]:
    """Header, data and the length written before them."""
    text = json.dumps(header)
    for length in (0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, len(text) + len(data) + 1):
        yield text, data, length
    norm = "model.norm.weight"
    size = header[norm]["data_offsets"][1] - header[norm]["data_offsets"][0]
    changes: list[Header] = [
        {"data_offsets": [len(data), len(data) + size]},
        {"data_offsets": [0, size]},
        {"data_offsets": [-size, 0]},
        {"data_offsets": [2**63, 2**63 + size]},
        {"data_offsets": [size, 0]},
        {"data_offsets": []},
        {"data_offsets": "all"},
        {"dtype": "F128"},
        {"dtype": 4},
        {"dtype": "F64"},
        {"shape": [2**31, 2**31]},
        {"shape": [2**63, 2]},
        {"shape": [-1]},
        {"shape": []},
        {"shape": [1.5]},
    ]
    for change in changes:
        yield json.dumps({**header, norm: {**header[norm], **change}}), data, None
    yield "[" * 100_000, b"", None
    yield '{"a":' * 100_000, b"", None
    yield '{"__metadata__":' + '{"a":' * 100_000, b"", None
    many = (
        f'"{i}.rotary_emb.inv_freq":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        for i in range(1_000_000)
    )
    yield "{" + ",".join(many) + "}", b"", None
    yield "{}", b"", None
    yield "null", b"", None
    yield "\xff", b"", None


def test_headers_that_nobody_writes_are_refused(process: Loader, folder: Path) -> None:
    header, data = parts(folder / WEIGHTS)
    for text, behind, length in crafted(header, data):
        write(folder / WEIGHTS, text, behind, length)
        said = process.refusal(folder)
        assert WEIGHTS in said or "do not match config.json" in said


def mutated(content: bytes, chance: random.Random) -> bytes:
    """``content`` with some bytes of its header, or rarely behind it, changed, or its end cut."""
    end = 8 + int.from_bytes(content[:8], "little")
    made = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(8) if chance.random() < 0.1 else chance.randrange(8, end)
        made[place] = chance.choice((chance.randrange(256), *b'0189,:[]{}"-eE.'))
    return bytes(made[: chance.randrange(len(made))]) if chance.random() < 0.1 else bytes(made)


def test_mutated_weights_are_refused_or_served(process: Loader, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    chance = random.Random(os.environ.get("FUZZ_SEED", "1"))
    kinds = set()
    for _ in range(MUTATED):
        (folder / WEIGHTS).write_bytes(mutated(content, chance))
        kinds.add(process.load(folder, exits="none")[0])
    assert "refused" in kinds


def test_a_gguf_file_is_no_weight_file(process: Loader, folder: Path) -> None:
    """By its own name it may be one, if there is more in it than its first letters."""
    chance = random.Random(2)
    for count in (0, 8, 24, 4096):
        content = b"GGUF" + bytes(chance.randrange(256) for _ in range(count))
        (folder / WEIGHTS).write_bytes(content)
        assert "is damaged" in process.refusal(folder)
        (folder / "model.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match="is no GGUF file that can be read"):
            resolve(str(folder / "model.gguf"), cache=folder / "cache")


def heads(folder: Path) -> dict[str, Path]:
    """Files of all kinds of heads for the tiny model, by their option."""
    config = config_from_hf(folder)
    weights = load_weights(folder, config, dtype=torch.float32)
    own = fingerprint(weights)
    exits = ExitFile(own, shared_heads(weights, config, (1, 2), threshold=0.5), {}, {})
    task = DecisionTask(
        "sure",
        "Sure?",
        ("no", "yes"),
        DecisionHeads((2, 4), torch.randn(2, 2, 2 * config.hidden_size), torch.randn(2, 2)),
    )
    files: dict[str, tuple[Any, Path]] = {
        "exits": (exits, folder / "exits.safetensors"),
        "draft_head": (
            DraftFile(own, draft_head(config), ((0.1, 0.5),) * 10, {}, {}),
            folder / "own.draft.safetensors",
        ),
        "decision_heads": (
            DecisionFile(own, {"sure": task}),
            folder / "own.decisions.safetensors",
        ),
    }
    for file, path in files.values():
        file.save(path)
    return {option: path for option, (_, path) in files.items()}


def draft_head(config: ModelConfig) -> DraftHead:
    width, inner = config.hidden_size, config.intermediate_size

    def random_weight(*shape: int) -> Tensor:
        return torch.randn(shape) / 8

    return DraftHead(
        layers=(1, 2, 4),
        fuse=random_weight(width, 4 * width),
        feedback=random_weight(width, 2 * width),
        attn_norm=torch.ones(width),
        qkv=random_weight(config.query_size + 2 * config.kv_size, width),
        o=random_weight(width, config.query_size),
        mlp_norm=torch.ones(width),
        gate_up=random_weight(2 * inner, width),
        down=random_weight(width, inner),
        norm=torch.ones(width),
        vocab=torch.arange(3, config.vocab_size, 2),
    )


@pytest.fixture(scope="module")
def with_heads(
    tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    folder = copy_of(tiny_dir, tmp_path_factory.mktemp("heads") / "model")
    return folder, heads(folder)


def test_heads_that_nobody_spoilt_are_served(
    process: Loader, with_heads: tuple[Path, dict[str, Path]]
) -> None:
    folder, files = with_heads
    kind, tokens = process.load(folder, **{option: str(path) for option, path in files.items()})
    assert (kind, tokens > 6) == ("answered", True)


@pytest.mark.parametrize("option", ["exits", "draft_head", "decision_heads"])
def test_mutated_heads_are_refused_or_served(
    process: Loader, with_heads: tuple[Path, dict[str, Path]], tmp_path: Path, option: str
) -> None:
    folder, files = with_heads
    content, path = files[option].read_bytes(), tmp_path / files[option].name
    chance = random.Random(os.environ.get("FUZZ_SEED", "3"))
    for _ in range(MUTATED // 4):
        path.write_bytes(mutated(content, chance))
        process.load(folder, **{option: str(path)})


NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    True,
    1.0,
    2.5,
    10**9,
    2**31,
    10**30,
    float("nan"),
    1e999,
    "1",
    None,
    [1],
    {},
)


def replaced(value: Any, chance: random.Random) -> Any:
    """JSON with one number of it replaced."""
    if isinstance(value, dict) and value:
        name = chance.choice(sorted(value))
        return {**value, name: replaced(value[name], chance)}
    if isinstance(value, list) and value:
        place = chance.randrange(len(value))
        return [*value[:place], replaced(value[place], chance), *value[place + 1 :]]
    return chance.choice(NUMBERS)


@pytest.mark.parametrize("option", ["exits", "draft_head", "decision_heads"])
def test_numbers_of_heads_are_checked(
    process: Loader, with_heads: tuple[Path, dict[str, Path]], tmp_path: Path, option: str
) -> None:
    folder, files = with_heads
    header, data = parts(files[option])
    path, chance = tmp_path / files[option].name, random.Random(4)
    names = {
        "exits": ("exit_layers", "thresholds", "floors", "operating_points"),
        "draft_head": ("layers", "chances"),
        "decision_heads": ("tasks",),
    }
    for _ in range(80):
        own = dict(header["__metadata__"])
        name = chance.choice(names[option])
        own[name] = json.dumps(replaced(json.loads(own[name]), chance))
        write(path, json.dumps({**header, "__metadata__": own}), data)
        process.load(folder, **{option: str(path)})


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([5, 3], dtype=torch.uint8),
        torch.tensor([0, 2**63 - 1, -(2**63), -1, 5]),
        torch.tensor([1, 2**40, 2**41]),
        torch.tensor([-5, 3]),
        torch.tensor([True, False]),
        torch.tensor([[1, 2]]),
        torch.tensor([], dtype=torch.long),
    ],
)
def test_a_vocabulary_whose_differences_wrap_around_is_none(ids: Tensor) -> None:
    """Rows that there are not were read of the LM head."""
    with pytest.raises(ValueError, match="vocab"):
        check_vocab(ids)


def test_a_draft_head_reads_whole_layers(
    with_heads: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    folder, files = with_heads
    header, data = parts(files["draft_head"])
    own = {**header["__metadata__"], "layers": "[1.0, 2, 4]"}
    path = tmp_path / "own.draft.safetensors"
    write(path, json.dumps({**header, "__metadata__": own}), data)
    with pytest.raises(Exception, match="states after layers"):
        load_draft_head(path, fingerprint=own["fingerprint"], config=config_from_hf(folder))


def test_wide_numbers_that_narrow_ones_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file({"a": torch.tensor([float("nan")])}, path)
    with pytest.raises(ExitFileError, match="tensor a has values"):
        read_safetensors(path, "an exit file", ExitFileError)
