"""Log-likelihoods by transformers in fp32: ``python -m tests.clients.reference FOLDER``.

Reads a JSON list of [context, continuation] and writes the list of their log-likelihoods, each with
its number of tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Score what is read from standard input."""
    folder = sys.argv[1]
    tokenizer = cast("Any", AutoTokenizer).from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    values = []
    for context, continuation in json.load(sys.stdin):
        before = len(tokenizer(context, add_special_tokens=False).input_ids)
        ids = tokenizer(context + continuation, add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, before - 1 : -1]
        chosen = torch.tensor(ids[before:])[:, None]
        value = float(logits.log_softmax(-1).gather(1, chosen).sum())
        values.append([value, len(chosen)])
    sys.stdout.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
