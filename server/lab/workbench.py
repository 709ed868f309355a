"""What calibration and evaluation work with: an engine, the model that judges, the exit file."""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from offramp.models.exits.deltas import delta_paths
from offramp.models.exits.file import ExitFile, load_exits, read_metadata, weights_of
from offramp.models.exits.training.data import Answer
from offramp.models.families import config_from_hf
from offramp.models.loading.sources import resolve
from offramp.models.sampling_params import ExitSettings, SamplingParams
from offramp.models.transformer import Transformer
from offramp.server.config import EngineConfig
from offramp.server.engine.build import build_engine, runner_of
from offramp.server.engine.engine import Engine
from offramp.server.engine.offline import Finished, run_all
from offramp.server.engine.request import EngineOutput, GenerationRequest
from offramp.server.lab.options import LabError
from offramp.server.lab.runs import Run, StepLog, judge
from offramp.server.text.prompts import read_prompts
from offramp.server.text.tokenizer import Tokenizer

_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Workbench:
    """A loaded model with its exits; ``file`` holds the exit heads in the model's dtype.

    ``concurrency`` answers are in flight, each of at most ``max_tokens``.
    """

    engine: Engine
    model: Transformer
    file: ExitFile
    tokenizer: Tokenizer
    max_tokens: int
    concurrency: int

    def run(self, prompts: Sequence[tuple[int, ...]], exits: ExitSettings) -> Run:
        """Greedy answers under ``exits``, judged at full depth."""
        steps = StepLog()
        finished = self.answer(prompts, exits, steps)
        answers = [Answer(item.request.prompt, tuple(item.token_ids)) for item in finished]
        return Run(tuple(finished), judge(self.model, answers), steps)

    def answer(
        self, prompts: Sequence[tuple[int, ...]], exits: ExitSettings, steps: StepLog | None = None
    ) -> list[Finished]:
        """Greedy answers under ``exits``, not judged; ``steps`` notes what the engine did.

        Raises LabError when an answer ends without a token.
        """
        sampling = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0.0,
            stop_token_ids=frozenset(self.engine.info.eos_token_ids),
        )

        def observe(output: EngineOutput) -> None:
            if steps is not None and output.stats is not None:
                steps.add(output.stats)

        requests = (
            GenerationRequest(str(index), prompt, sampling, exits)
            for index, prompt in enumerate(prompts)
        )
        finished = run_all(self.engine, requests, concurrency=self.concurrency, observe=observe)
        for item in finished:
            if not item.token_ids or item.stats is None:
                raise LabError(f"an answer ended without a token: {item.reason}")
        return finished

    def text(self, token_ids: Sequence[int]) -> str:
        """What an answer says, special tokens left out."""
        detokenizer = self.tokenizer.detokenizer()
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...] | None]:
        """Token ids of each text as a user's message; None where an answer would not fit behind."""
        room = self.engine.info.max_model_len - self.max_tokens
        ids = [
            self.tokenizer.encode_chat([{"role": "user", "content": text}], 64 * _CONTEXT)
            for text in texts
        ]
        return [each if len(each) <= room else None for each in ids]

    def prompts(self, paths: Sequence[Path], limit: int | None, seed: int) -> list[tuple[int, ...]]:
        """Different prompts of all files in an order drawn by ``seed``, at most ``limit``.

        Raises PromptFileError, or LabError when nothing is left.
        """
        texts = list(dict.fromkeys(text for path in paths for text in read_prompts(path)))
        random.Random(seed).shuffle(texts)  # noqa: S311 (an order, not a secret)
        # Encoding is what takes time, so what is surely too much is not encoded.
        fitting: list[tuple[int, ...]] = []
        for text in texts:
            if limit is not None and len(fitting) >= limit:
                break
            fitting += [ids for ids in self.encode([text]) if ids is not None]
        if not fitting:
            raise LabError("no prompt is short enough to leave room for an answer")
        return fitting


def open_workbench(
    args: argparse.Namespace,
    *,
    every_exit: bool,
    activation_dtype: Literal["int8", "int16"] = "int16",
) -> Workbench:
    """Load what ``args`` name (see options.add_options).

    The model's weights are those that the exits were trained for. With ``every_exit`` tokens leave
    wherever their score allows it, else only where it also pays: what calibration promises must not
    lean on exits that this machine happened to refuse. Answers are made with inputs of
    ``activation_dtype``, and judged with 16 bits.

    Raises ModelError (also for exits of another model) and EngineConfigError.
    """
    metadata = read_metadata(args.exits)
    folder = resolve(args.model)
    shape = config_from_hf(folder)
    config = EngineConfig(
        exits=str(args.exits),
        weights=weights_of(metadata["data"]),
        max_num_seqs=args.concurrency,
        max_model_len=min(_CONTEXT, shape.max_position_embeddings),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        activation_dtype=activation_dtype,
        # Every run would find more prompts in the cache than the one before.
        enable_prefix_caching=False,
        # Answers are judged here already.
        exit_audit_rate=0.0,
    )
    engine = build_engine(config, folder, model_name=args.model, every_exit=every_exit)
    runner = runner_of(engine)
    file = load_exits(
        args.exits,
        fingerprint=metadata["fingerprint"],
        hidden_size=shape.hidden_size,
        dtype=runner.model.dtype,
        device=runner.model.device,
    )
    tokenizer = Tokenizer.load(folder)
    return Workbench(engine, runner.model, file, tokenizer, args.max_tokens, args.concurrency)


def read_exact(bench: Workbench, path: Path) -> ExitFile:
    """The file in fp32, which holds its fp16 exactly, whatever the model of ``bench`` runs in."""
    return load_exits(
        path,
        fingerprint=bench.file.fingerprint,
        hidden_size=bench.model.config.hidden_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def write_beside_deltas(file: ExitFile, source: Path, target: Path) -> None:
    """Save ``file``, made from ``source``, as ``target``, and take the deltas of ``source`` along.

    Raises LabError where that cannot be written.
    """
    try:
        file.save(target)
        if target.resolve() != source.resolve():
            for path in delta_paths(source):
                name = target.stem + path.name.removeprefix(source.stem)
                shutil.copyfile(path, target.with_name(name))
    except OSError as error:
        raise LabError(f"{target}: {error.strerror}") from error
