"""SmolLM2's GGUF file to a model folder in Hugging Face's layout."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# What transformers notes about the machine it ran on, of no meaning to a reader of the folder.
LOCAL_KEYS = ("_name_or_path", "_model_name_or_path", "is_local", "local_files_only")


def convert(source: Path, folder: Path, eos_token_ids: tuple[int, ...]) -> None:
    """Write the GGUF file ``source`` as fp32 safetensors, config, tokenizer and chat template.

    Digits are split one by one as llama.cpp's ``smollm`` rule does; ``eos_token_ids`` become the
    ends of text in generation_config.json. Needs memory of about twice the fp32 weights.
    """
    # Progress of the inner steps is drawn by tqdm without a switch; the caller has its own bar.
    with redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # The converter builds a plain byte-level rule and forgets that digits stand alone, which
        # changes the ids of blanks before digits.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            # Packed weights, the default, cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.generation_config.eos_token_id = list(eos_token_ids)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.glob("*.json"):
        if path.name != "tokenizer.json":
            _strip(path)


def _strip(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in LOCAL_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
