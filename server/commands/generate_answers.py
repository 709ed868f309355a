"""The model's own answers to prompts, made by the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offramp.models.config import Weights
from offramp.models.exits.training.data import Answer, AnswerLog
from offramp.models.kv_cache import bytes_per_block
from offramp.models.sampling_params import SamplingParams
from offramp.server.commands.own_answers import Job, TrainingError
from offramp.server.commands.tune_backbone import device_of
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine
from offramp.server.engine.offline import run_all
from offramp.server.engine.request import EngineOutput, GenerationRequest
from offramp.server.text.prompts import read_prompts
from offramp.server.text.tokenizer import Tokenizer

_CONTEXT = 2048
_CACHE_GIB = 1.0


def generate(job: Job, weights: Weights) -> list[Answer]:
    """Greedy full-depth answers of the model itself, by the engine; those kept are not repeated."""
    args = job.args
    log = AnswerLog(job.work.path("answers.jsonl"))
    texts = [text for path in args.prompts for text in read_prompts(path)]
    requests = _requests(job, texts)
    if not requests:
        return []
    engine = build_engine(_engine(job, requests, weights), job.folder, model_name=args.model)
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


def _engine(job: Job, requests: Sequence[GenerationRequest], weights: Weights) -> EngineConfig:
    """An engine that holds as many answers as are to be in flight, and no more memory."""
    args = job.args
    sizes = sorted(len(request.prompt) + args.max_tokens for request in requests)
    config = EngineConfig(
        exits="none",
        weights=weights,
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
