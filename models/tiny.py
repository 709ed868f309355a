"""A tiny random model with a byte tokenizer, for tests and for trying the server offline."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

LAYERS = 4
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
INNER = 128
VOCAB = 320
CONTEXT = 2048
SEED = 20
# Large enough that layers change the state and greedy text does not fall into one token.
WEIGHT_STD = 0.3
# Rows of specials and of bytes that are no printable ASCII are made short: tied to the head, they
# then rarely win, so generated text is readable and seldom ends by itself.
UNLIKELY_SCALE = 0.1
END_OF_TEXT, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# One merge each, so the vocabulary has no id without a text.
PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve "
    "co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tiny(folder: Path) -> Path:
    """Write the model into ``folder`` in Hugging Face's layout; the same bytes every time.

    Llama-shaped, 4 layers, tied embedding, 320 tokens, context 2048; ends at ``<|im_end|>`` or
    ``<|endoftext|>``. Returns ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Moved into place file by file, so that a reader of the same folder never meets half of one.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _write(Path(scratch))
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)
    return folder


def _write(folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(_weights(tokenizer), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in _json_files().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _json_files() -> dict[str, dict[str, object]]:
    ids = {"bos_token_id": 1, "pad_token_id": 2}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "dtype": "float32",
            "eos_token_id": 2,
            **ids,
        },
        "generation_config.json": {"eos_token_id": [2, 0], **ids},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "bos_token": TURN_START,
            "eos_token": TURN_END,
            "pad_token": TURN_END,
            "unk_token": END_OF_TEXT,
        },
    }


def _tokenizer() -> Tokenizer:
    pairs = PAIRS.split()
    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *pairs]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[(pair[0], pair[1]) for pair in pairs]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer


def _weights(tokenizer: Tokenizer) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * WEIGHT_STD

    weights = {"model.embed_tokens.weight": random(VOCAB, HIDDEN) * _row_scale(tokenizer)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights[f"{prefix}input_layernorm.weight"] = 1 + random(HIDDEN)
        weights[f"{prefix}self_attn.q_proj.weight"] = random(HEADS * HEAD_DIM, HIDDEN)
        weights[f"{prefix}self_attn.k_proj.weight"] = random(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{prefix}self_attn.v_proj.weight"] = random(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{prefix}self_attn.o_proj.weight"] = random(HIDDEN, HEADS * HEAD_DIM)
        weights[f"{prefix}post_attention_layernorm.weight"] = 1 + random(HIDDEN)
        weights[f"{prefix}mlp.gate_proj.weight"] = random(INNER, HIDDEN)
        weights[f"{prefix}mlp.up_proj.weight"] = random(INNER, HIDDEN)
        weights[f"{prefix}mlp.down_proj.weight"] = random(HIDDEN, INNER)
    weights["model.norm.weight"] = 1 + random(HIDDEN)
    return weights


def _row_scale(tokenizer: Tokenizer) -> Tensor:
    """Factor of each embedding row, [V, 1]."""
    texts = [tokenizer.decode([index]) for index in range(VOCAB)]
    likely = torch.tensor([text.isascii() and text.isprintable() and bool(text) for text in texts])
    return torch.where(likely, 1.0, UNLIKELY_SCALE).unsqueeze(1)
