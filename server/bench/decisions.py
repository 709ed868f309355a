"""``offramp bench decisions``: questions a second, beside accuracy, calibration and depth.

The same inputs go to a server in every mode, in turns. It reports only if mode ``off`` ran every
layer for every question, and gave the same probabilities alone as under load.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from offramp.models.loading.sources import resolve
from offramp.server.bench.common import (
    Refused,
    Report,
    Say,
    UsageError,
    columns,
    spread,
    table,
    today,
)
from offramp.server.bench.device import machine_facts
from offramp.server.bench.over_http import JsonClient
from offramp.server.bench.process import SERVE_LLAMACPP, SERVE_OFFRAMP, serving
from offramp.server.bench.systems import gguf
from offramp.server.bench.targets import transformers_model
from offramp.server.text.labelled import LabelledTexts, read_labelled
from offramp.server.text.tokenizer import Tokenizer

_CHECKED = 8
_CLOSE = 1e-4
_BINS = 10
# Likeliest tokens that llama.cpp is asked for; labels beyond count as impossible.
_PEER_TOKENS = 100
_PEER_CONTEXT = 4096
# What a request asks beside the question that is judged.
_OTHERS = (
    *("The text is about {}.", "The author likes {}.", "The text mentions {}."),
    *("Somebody who cares for {} would read it.",),
)
_TOPICS = (
    *("sports", "food", "money", "travel", "health", "science", "history", "politics"),
    *("music", "films", "books", "animals", "weather", "work", "family", "technology"),
)
_COLUMNS = columns(
    "mode {mode} | questions {questions} | in flight {concurrency} | questions/s {per_s:.1f} | "
    "x off {ratio:.2f} | p50 ms {p50_ms:.1f} | p99 ms {p99_ms:.1f} | accuracy {accuracy:.4f} | "
    "Brier {brier:.4f} | ECE {ece:.4f} | agreement {agreement:.4f} | mean layer {mean_layer:.2f} | "
    "layers executed {executed:.3f}"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One answered request: probabilities [options] of the judged question, and what it cost.

    ``layers`` are those of all its questions; ``executed`` is the share of layers that ran.
    """

    seconds: float
    probabilities: tuple[float, ...]
    layers: tuple[int, ...]
    executed: float
    prompt: tuple[int, ...] = ()


@dataclass(slots=True)
class _Result:
    """Everything measured of a mode with so many questions and requests in flight."""

    mode: str
    questions: int
    concurrency: int
    speeds: list[float] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)


def bench(args: argparse.Namespace, command: str, say: Say) -> Report:
    """Measure, and make the report. Raises BenchError, Refused and PromptFileError."""
    values = [value for _, value in args.labels]
    rows = read_labelled(args.data, args.text, args.label, values)
    needed = args.rows * args.rounds
    if len(rows.texts) < needed:
        raise UsageError(f"--data has {len(rows.texts)} rows; {needed} are needed")
    names = [*args.modes, *([args.peer] if args.peer else [])]
    with ExitStack() as stack:
        url = args.url or stack.enter_context(_own_server(args))
        server = _Server(args, url)
        card = server.card()
        _check(server, rows, card["num_layers"])
        targets: dict[str, _Server | _Peer] = dict.fromkeys(args.modes, server)
        if args.peer == "llamacpp":
            targets[args.peer] = _LlamaCpp(args, server, stack.enter_context(_llamacpp(args)))
        elif args.peer:
            targets[args.peer] = _Transformers(args, server)
        results = []
        for questions in args.questions:
            for concurrency in args.concurrency:
                say(f"{questions} questions, {concurrency} in flight")
                own = [_Result(name, questions, concurrency) for name in names]
                for number in range(args.rounds):
                    batch = rows.texts[number * args.rows : (number + 1) * args.rows]
                    for result in own if number % 2 else reversed(own):
                        asked, seconds = targets[result.mode].run(batch, result)
                        result.asked += asked
                        result.speeds.append(questions * len(batch) / seconds)
                results.append(own)
    found = [row for own in results for row in _rows(own, rows)]
    document = {
        "command": command,
        "date": today(),
        "machine": machine_facts(),
        "model": args.model,
        "data": args.data.name,
        "instructions": args.instructions,
        "answers": [name for name, _ in args.labels],
        "card": card,
        "rows": found,
    }
    return Report(table(found, _COLUMNS) + "\n\n", document)


@contextmanager
def _own_server(args: argparse.Namespace) -> Iterator[str]:
    words = [args.model, "--port", "0", "--threads", str(args.threads), "--weights", args.weights]
    words += ["--decision-heads", args.decision_heads, "--max-num-seqs", "8"]
    # The modes get the same inputs in turns: nobody may find what another left.
    words.append("--no-enable-prefix-caching")
    with serving(*SERVE_OFFRAMP, *words) as process:
        yield process.address()


@contextmanager
def _llamacpp(args: argparse.Namespace) -> Iterator[str]:
    path = args.peer_gguf or gguf(args.model)
    threads = args.threads or torch.get_num_threads()
    words = [str(path), str(threads), str(max(args.concurrency)), str(_PEER_CONTEXT)]
    with serving(*SERVE_LLAMACPP, *words) as process:
        yield process.address()


class _Server:
    """An Offramp server, asked over /v1/decisions."""

    def __init__(self, args: argparse.Namespace, url: str) -> None:
        self._args = args
        self._client = JsonClient(url, args.api_key)
        names = [name for name, _ in args.labels]
        question: dict[str, Any] = {"type": args.type, "instructions": args.instructions}
        if args.type == "choice":
            question["choices"] = [{"value": name} for name in names]
        elif args.type == "score":
            question["levels"] = [{"label": name} for name in names]
        self._question = question

    def card(self) -> dict[str, Any]:
        """What the server says of its model."""
        found: dict[str, Any] = self._client.get("/v1/models")["data"][0]
        return found

    def run(self, texts: Sequence[str], result: _Result) -> tuple[list[Asked], float]:
        """Answers about all ``texts``, and the seconds they took."""
        return self.ask(texts, result.mode, result.questions, result.concurrency)

    def ask(
        self, texts: Sequence[str], mode: str, questions: int, concurrency: int
    ) -> tuple[list[Asked], float]:
        """As `run`."""
        bodies = [self._body(text, mode, questions) for text in texts]
        replies, seconds = self._client.post_all("/v1/decisions", bodies, concurrency)
        return [_asked(spent, reply) for spent, reply in replies], seconds

    def _body(self, text: str, mode: str, questions: int) -> dict[str, Any]:
        args = self._args
        exits: dict[str, Any] = {"mode": mode}
        if mode == "adaptive" and args.quality is not None:
            exits["quality"] = args.quality
        if args.task is not None:
            exits["task"] = args.task
        others = [
            {"type": "predicate", "instructions": form.format(topic)}
            for form in _OTHERS
            for topic in _TOPICS
        ]
        return {
            "model": args.model,
            "input": text,
            "questions": [self._question, *others[: questions - 1]],
            "early_exit": exits,
            "calibration": args.calibration,
            "permutations": args.permutations,
            "return_prompt_token_ids": True,
        }


def _asked(seconds: float, reply: Mapping[str, Any]) -> Asked:
    answers = reply["answers"]
    first, metrics = answers[0], reply["metrics"]["early_exit"]
    if first["type"] == "predicate":
        given = (first["probability"], 1 - first["probability"])
    else:
        given = tuple(each["probability"] for each in first["probabilities"])
    layers = tuple(answer["exit_layer"] for answer in answers)
    prompt = tuple(first["prompt_token_ids"])
    return Asked(seconds, given, layers, 1 - metrics["layers_skipped_fraction"], prompt)


class _Peer:
    """Another program, asked for the labels' first tokens behind the prompts that Offramp made."""

    def __init__(self, args: argparse.Namespace, ours: _Server) -> None:
        self._ours = ours
        tokenizer = Tokenizer.load(resolve(args.model))
        names = [name for name, _ in args.labels]
        self._first = [ids[0] for ids in tokenizer.encode_rendered(names)]
        self._prompts: dict[str, tuple[int, ...]] = {}

    def run(self, texts: Sequence[str], result: _Result) -> tuple[list[Asked], float]:
        """As `_Server.run`; further questions of a request are asked as often as the first."""
        missing = [text for text in texts if text not in self._prompts]
        asked, _ = self._ours.ask(missing, "off", 1, 1)
        self._prompts |= {text: each.prompt for text, each in zip(missing, asked, strict=True)}
        prompts = [self._prompts[text] for text in texts for _ in range(result.questions)]
        given, seconds = self._ask(prompts, result.concurrency)
        firsts = given[:: result.questions]
        return [Asked(spent, found, (), 1.0) for spent, found in firsts], seconds

    def _ask(
        self, prompts: Sequence[tuple[int, ...]], concurrency: int
    ) -> tuple[list[tuple[float, tuple[float, ...]]], float]:
        """Seconds and the labels' probabilities for each prompt, and the seconds of all."""
        raise NotImplementedError


class _LlamaCpp(_Peer):
    """llama.cpp's server, which tells the likeliest tokens."""

    def __init__(self, args: argparse.Namespace, ours: _Server, url: str) -> None:
        super().__init__(args, ours)
        # llama.cpp closes connections without saying so.
        self._client = JsonClient(url, keep=False)

    def _ask(
        self, prompts: Sequence[tuple[int, ...]], concurrency: int
    ) -> tuple[list[tuple[float, tuple[float, ...]]], float]:
        bodies = [
            {
                "prompt": list(prompt),
                "n_predict": 1,
                "temperature": 0,
                "n_probs": _PEER_TOKENS,
                "cache_prompt": False,
            }
            for prompt in prompts
        ]
        replies, seconds = self._client.post_all("/completion", bodies, concurrency)
        return [(spent, self._told(reply)) for spent, reply in replies], seconds

    def _told(self, reply: Mapping[str, Any]) -> tuple[float, ...]:
        likely = reply["completion_probabilities"][0]["top_logprobs"]
        known = {each["id"]: math.exp(each["logprob"]) for each in likely}
        given = [known.get(token, 0.0) for token in self._first]
        total = sum(given) or 1.0
        return tuple(each / total for each in given)


class _Transformers(_Peer):
    """transformers in this process, fp32, one prompt after the other."""

    def __init__(self, args: argparse.Namespace, ours: _Server) -> None:
        super().__init__(args, ours)
        self._model = transformers_model(resolve(args.model), torch.float32).eval()
        if args.threads:
            torch.set_num_threads(args.threads)

    @torch.inference_mode()
    def _ask(
        self, prompts: Sequence[tuple[int, ...]], concurrency: int
    ) -> tuple[list[tuple[float, tuple[float, ...]]], float]:
        del concurrency
        found = []
        for prompt in prompts:
            begun = time.perf_counter()
            ids = torch.tensor([prompt])
            logits = self._model(input_ids=ids, logits_to_keep=1).logits[0, -1, self._first]
            given = tuple(logits.softmax(0).tolist())
            found.append((time.perf_counter() - begun, given))
        return found, sum(spent for spent, _ in found)


def _check(server: _Server, rows: LabelledTexts, num_layers: int) -> None:
    """Mode off runs every layer, and answers alone as in company; raises Refused."""
    texts = rows.texts[:_CHECKED]
    alone, _ = server.ask(texts, "off", 1, 1)
    company, _ = server.ask(texts, "off", 2, _CHECKED)
    for one, other in zip(alone, company, strict=True):
        if {*one.layers, *other.layers} != {num_layers}:
            raise Refused("mode off left the stack early")
        apart = max(abs(a - b) for a, b in zip(one.probabilities, other.probabilities, strict=True))
        if apart > _CLOSE:
            raise Refused(f"mode off answers differ by {apart:.1e} between loads")


def _rows(own: Sequence[_Result], rows: LabelledTexts) -> list[dict[str, Any]]:
    """Figures of all modes under one load."""
    off = next((result for result in own if result.mode == "off"), None)
    found = []
    for result in own:
        times = sorted(each.seconds for each in result.asked)
        layers = [layer for each in result.asked for layer in each.layers]
        row: dict[str, Any] = {
            "mode": result.mode,
            "questions": result.questions,
            "concurrency": result.concurrency,
            "per_s": round(statistics.median(result.speeds), 2),
            "p50_ms": round(1000 * statistics.median(times), 2),
            "p99_ms": round(1000 * times[int(0.99 * (len(times) - 1))], 2),
            "mean_layer": round(statistics.fmean(layers), 3) if layers else None,
            "executed": round(statistics.fmean(each.executed for each in result.asked), 4),
            **_quality(result.asked, rows.answers),
        }
        if off is not None:
            ratios = spread(result.speeds, off.speeds)
            row |= {"ratio": ratios["median"], "ratio_min": ratios["min"]}
            row["ratio_max"] = ratios["max"]
            same = [_best(a) == _best(b) for a, b in zip(result.asked, off.asked, strict=True)]
            row["agreement"] = round(statistics.fmean(same), 4)
        found.append(row)
    return found


def _best(asked: Asked) -> int:
    return asked.probabilities.index(max(asked.probabilities))


def _quality(asked: Sequence[Asked], answers: Sequence[int] | None) -> dict[str, float | None]:
    """Accuracy, Brier score (sum over the answers) and expected calibration error in ten bins."""
    if answers is None:
        return {"accuracy": None, "brier": None, "ece": None}
    right = [_best(each) == truth for each, truth in zip(asked, answers, strict=False)]
    brier = [
        sum((p - (index == truth)) ** 2 for index, p in enumerate(each.probabilities))
        for each, truth in zip(asked, answers, strict=False)
    ]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(_BINS)]
    for each, hit in zip(asked, right, strict=True):
        top = max(each.probabilities)
        bins[min(_BINS - 1, int(top * _BINS))].append((top, hit))
    gaps = [
        abs(sum(top for top, _ in own) - sum(hit for _, hit in own)) / len(asked) for own in bins
    ]
    return {
        "accuracy": round(statistics.fmean(right), 4),
        "brier": round(statistics.fmean(brier), 4),
        "ece": round(sum(gaps), 4),
    }
