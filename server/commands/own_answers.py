"""What all trainings start from: the model, and its own answers as they are read or made."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from offramp.models.config import ModelConfig
from offramp.models.errors import ModelError
from offramp.models.exits.training.data import (
    Answer,
    AnswerLog,
    read_answers,
    write_answers,
)
from offramp.models.exits.training.pipeline import Work
from offramp.models.exits.training.train import Report
from offramp.models.kv_cache import bytes_per_block
from offramp.models.sampling_params import SamplingParams
from offramp.server.commands.tune_backbone import device_of
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import EngineOutput, GenerationRequest
from offramp.server.text.prompts import read_prompts
from offramp.server.text.tokenizer import Tokenizer

# Fewer leave nothing to judge on once the rest is split between adapters, gates and keys.
_FEWEST_ANSWERS = 50
_CONTEXT = 2048
_CACHE_GIB = 1.0


class TrainingError(ModelError):
    """The training cannot be done as asked."""


@dataclass(frozen=True, slots=True)
class Job:
    """One call of the command; ``weights`` are those of the model as it was."""

    args: argparse.Namespace
    folder: Path
    config: ModelConfig
    weights: dict[str, Tensor]
    work: Work
    bars: Progress

    def bar(self, name: str, total: int) -> Callable[[int], None]:
        """A progress bar; to be called with how much is done."""
        task = self.bars.add_task(name, total=total)
        return lambda done: self.bars.update(task, completed=done)


def check_out(path: Path) -> None:
    """Better now than after hours of training."""
    if path.is_dir():
        raise TrainingError(f"--out {path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise TrainingError(f"--out {path}: the folder cannot be written")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from error


def own_answers(job: Job) -> list[Answer]:
    """The answers to train on; raises TrainingError if they are too few."""
    args = job.args
    answers = read_answers(args.answers, job.config) if args.answers else _generate(job)
    if len(answers) < _FEWEST_ANSWERS:
        raise TrainingError(f"{len(answers)} answers; at least {_FEWEST_ANSWERS} are needed")
    if args.save_answers is not None:
        write_answers(args.save_answers, answers)
    return answers


def _generate(job: Job) -> list[Answer]:
    """Greedy full-depth answers of the model itself, by the engine; those kept are not repeated."""
    args = job.args
    log = AnswerLog(job.work.path("answers.jsonl"))
    texts = [text for path in args.prompts for text in read_prompts(path)]
    requests = _requests(job, texts)
    if not requests:
        return []
    engine = build_engine(_engine(job, requests), job.folder, model_name=args.model)
    progress = job.bar("answers", len(requests))
    prompts = {request.request_id: request.prompt for request in requests}
    tokens: dict[str, list[int]] = {name: [] for name in prompts}

    def observe(output: EngineOutput) -> None:
        for event in output.events:
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                answer = Answer(prompts[event.request_id], tuple(tokens[event.request_id]))
                log.add(int(event.request_id), answer)
                progress(len(log.answers))

    missing = [request for request in requests if int(request.request_id) not in log.answers]
    run_all(engine, missing, concurrency=args.concurrency, observe=observe)
    return [answer for _, answer in sorted(log.answers.items()) if answer.answer]


def _engine(job: Job, requests: Sequence[GenerationRequest]) -> EngineConfig:
    """An engine that holds as many answers as are to be in flight, and no more memory."""
    args = job.args
    sizes = sorted(len(request.prompt) + args.max_tokens for request in requests)
    config = EngineConfig(
        exits="none",
        device=args.device,
        max_num_seqs=args.concurrency,
        max_num_batched_tokens=max(512, 8 * args.concurrency),
        max_model_len=max(2, sizes[-1]),
    )
    dtype = torch.float32 if device_of(args.device).type == "cpu" else torch.bfloat16
    blocks = sum(-(-size // config.block_size) for size in sizes[-args.concurrency :])
    needed = blocks * bytes_per_block(job.config, config.block_size, dtype) / 2**30
    # A block more, against rounding; beyond the cap the engine makes some of the answers wait.
    memory = min(needed * (blocks + 1) / blocks, max(_CACHE_GIB, args.concurrency / 32))
    return config.model_copy(update={"kv_cache_memory": memory})


def _requests(job: Job, texts: Sequence[str]) -> list[GenerationRequest]:
    """Requests for the prompts that leave room for an answer, named by the prompts' numbers."""
    room = min(_CONTEXT, job.config.max_position_embeddings) - job.args.max_tokens
    if room < 1:
        raise TrainingError(f"--max-tokens {job.args.max_tokens} leaves no room for a prompt")
    tokenizer = Tokenizer.load(job.folder)
    sampling = SamplingParams(
        max_tokens=job.args.max_tokens,
        temperature=0.0,
        stop_token_ids=frozenset(job.config.eos_token_ids),
    )
    requests = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode_chat([{"role": "user", "content": text}], 64 * room)
        if len(ids) <= room:
            requests.append(GenerationRequest(str(index), ids, sampling))
    return requests


def reporter(bars: Progress) -> Report:
    """A bar for each thing that is trained."""
    tasks: dict[str, TaskID] = {}

    def report(name: str, done: int, total: int, loss: float) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
        bars.update(tasks[name], completed=done, description=f"{name} (loss {loss:.3f})")

    return report
