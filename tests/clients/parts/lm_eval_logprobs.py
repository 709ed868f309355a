"""lm-evaluation-harness: a small task through `local-completions`, with the remote tokenizer.

The log-likelihoods are compared with those of transformers, computed in fp32.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import yaml

from tests.clients.parts.checks import BASE_URL, MODEL, MODEL_FOLDER, PYTHON, WORK, check, run

# Of each token: differences add up over an answer. Keys, values and inputs of products have 16
# bits, of which keys and values alone make up to 1e-3.
TOLERANCE = 3e-3
DOCUMENTS = [
    ("The capital of France is", [" Paris", " London", " Berlin"]),
    ("Water freezes at a temperature of", [" zero degrees", " one hundred degrees"]),
    ("Two plus two is", [" four", " five", " twenty-two"]),
    ("The opposite of hot is", [" cold", " warm"]),
    ("Question: Is the sky blue?\nAnswer:", [" yes", " no"]),
]
TASK = {
    "task": "offramp_choices",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(WORK / "choices.jsonl")}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
COMPLETIONS = f"{BASE_URL}/completions"


def remote() -> bool:
    """Whether the server has what the remote tokenizer asks for."""
    from lm_eval.utils import check_remote_tokenizer_support  # noqa: PLC0415 (slow to import)

    return bool(check_remote_tokenizer_support(COMPLETIONS, max_retries=1))


@check("remote tokenizer")
def remote_tokenizer() -> None:
    assert remote(), "GET /tokenizer_info or POST /tokenize without a model is refused"


@check("log-likelihoods")
def loglikelihoods() -> str:
    import lm_eval  # noqa: PLC0415 (slow to import)
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    lines = [json.dumps({"text": text, "choices": choices}) for text, choices in DOCUMENTS]
    (WORK / "choices.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (WORK / "choices.yaml").write_text(yaml.safe_dump(TASK), encoding="utf-8")
    results: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": COMPLETIONS,
            "tokenizer_backend": "remote" if remote() else "huggingface",
            "tokenizer": str(MODEL_FOLDER),
            "max_length": 2048,
            "max_retries": 1,
        },
        tasks=[TASK["task"]],
        task_manager=TaskManager(include_path=str(WORK), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    found = {}
    for sample in results["samples"][TASK["task"]]:
        text, choices = sample["doc"]["text"], sample["doc"]["choices"]
        for choice, (value, _) in zip(choices, sample["filtered_resps"], strict=True):
            found[text, choice] = float(value)
    expected = reference()
    gap = max(abs(value - expected[pair][0]) / expected[pair][1] for pair, value in found.items())
    assert len(found) == sum(len(choices) for _, choices in DOCUMENTS)
    assert gap < TOLERANCE, f"differs from transformers by up to {gap:.2g} a token"
    score = results["results"][TASK["task"]]["acc,none"]
    return f"largest difference from transformers {gap:.2g} a token, accuracy {score:.2f}"


def reference() -> dict[tuple[str, str], tuple[float, int]]:
    """Log-likelihoods and tokens from transformers, in an environment that has it."""
    pairs = [[text, choice] for text, choices in DOCUMENTS for choice in choices]
    done = subprocess.run(
        [PYTHON, "-m", "tests.clients.reference", str(MODEL_FOLDER)],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    values = json.loads(done.stdout.splitlines()[-1])
    return {(pair[0], pair[1]): tuple(value) for pair, value in zip(pairs, values, strict=True)}


run()
