"""Questions with a fixed set of answers: their wording, and where in the model's output to look.

An answer is never generated. The prompt ends where the answer would begin, and the probabilities of
the tokens with which the possible answers begin are read there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import takewhile

from offramp.server.text.tokenizer import Tokenizer

# Questions whose ids are kept.
_TAILS_KEPT = 1024
_LONG = 4096
# Stands for a question while the chat template is rendered.
_MARK = "\N{WHITE SQUARE}question\N{WHITE SQUARE}"


class QuestionKind(StrEnum):
    """The question types of OpenAI's decisions API."""

    PREDICATE = "predicate"
    CHOICE = "choice"
    SCORE = "score"


@dataclass(frozen=True, slots=True)
class Option:
    """One possible answer: the ``label`` that the model would say, and what it stands for."""

    label: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about some input, with its possible answers in the order of the request."""

    kind: QuestionKind
    instructions: str
    options: tuple[Option, ...]

    @property
    def wording(self) -> str:
        """The question as the model reads it, behind the input."""
        labels = [option.label for option in self.options]
        lines = [self.instructions.strip()]
        if self.kind is QuestionKind.PREDICATE:
            lines = [f"Is the following true? {self.instructions.strip()}"]
        if any(option.description for option in self.options):
            lines += [_described(option) for option in self.options]
        if self.kind is QuestionKind.SCORE:
            ask = f"Answer with a number from {labels[0]} to {labels[-1]}."
        else:
            ask = f"Answer with {', '.join(labels[:-1])} or {labels[-1]}."
        return "\n".join((*lines, ask))

    def reordered(self, order: Sequence[int]) -> Question:
        """The same question with its options in another order."""
        return replace(self, options=tuple(self.options[index] for index in order))


def predicate(instructions: str, yes: str = "", no: str = "") -> Question:
    """Whether a statement about the input is true."""
    options = (Option("yes", yes), Option("no", no))
    return Question(QuestionKind.PREDICATE, instructions, options)


def score(instructions: str, levels: Sequence[str]) -> Question:
    """Which of the ordered ``levels`` fits the input; the model says their numbers."""
    options = tuple(Option(str(index), level) for index, level in enumerate(levels))
    return Question(QuestionKind.SCORE, instructions, options)


def question(kind: QuestionKind, instructions: str, labels: Sequence[str]) -> Question:
    """A question without descriptions; of a predicate the labels are yes and no."""
    match kind:
        case QuestionKind.PREDICATE:
            return predicate(instructions)
        case QuestionKind.SCORE:
            return score(instructions, labels)
        case QuestionKind.CHOICE:
            return Question(kind, instructions, tuple(map(Option, labels)))


def _described(option: Option) -> str:
    return f"{option.label}: {option.description}" if option.description else option.label


@dataclass(frozen=True, slots=True)
class LabelRead:
    """A place where several labels could go on: behind the label tokens ``path``."""

    path: tuple[int, ...]
    candidates: tuple[int, ...]


class LabelTree:
    """Labels as token ids, told apart where they branch.

    The probability of a label is what an answer that may only be one of the labels would have:
    at each branch, the probability of the label's token among the tokens that may follow. Labels
    that differ in their first token need one read. A label with which another begins is told from
    it by ``end``, the token that ends an answer.

    Raises ValueError, with the indices of two labels, where they are the same tokens.
    """

    def __init__(self, labels: Sequence[Sequence[int]], end: int) -> None:
        # What stands behind the end of an answer is never read.
        said = [tuple(takewhile(lambda token: token != end, label)) for label in labels]
        for index, text in enumerate(said):
            if text in said[:index] or not text:
                raise ValueError((said.index(text), index))
        texts = [
            (*text, end)
            if any(other[: len(text)] == text and other != text for other in said)
            else text
            for text in said
        ]
        self.reads: list[LabelRead] = []
        self._choices: list[list[tuple[int, int]]] = [[] for _ in texts]
        self._branch(texts, list(range(len(texts))), 0)

    def _branch(self, texts: list[tuple[int, ...]], members: list[int], depth: int) -> None:
        """Tell ``members`` apart, which share their first ``depth`` tokens."""
        while len(members) > 1 and len({texts[i][depth] for i in members}) == 1:
            depth += 1
        if len(members) == 1:
            return
        candidates = tuple(dict.fromkeys(texts[i][depth] for i in members))
        read = len(self.reads)
        self.reads.append(LabelRead(texts[members[0]][:depth], candidates))
        for place, token in enumerate(candidates):
            group = [i for i in members if texts[i][depth] == token]
            for i in group:
                self._choices[i].append((read, place))
            self._branch(texts, group, depth + 1)

    def probabilities(self, logits: Sequence[Sequence[float]]) -> list[float]:
        """Of each label, from the candidates' ``logits`` of every read; they add up to 1."""
        logs = [_log_softmax(each) for each in logits]
        return [
            math.exp(math.fsum(logs[read][place] for read, place in choices))
            for choices in self._choices
        ]


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """A prompt that ends where the answer begins, and the places where labels are told apart."""

    prompt: tuple[int, ...]
    tree: LabelTree


class SameLabels(ValueError):
    """Two answers of a question are the same to the model; ``first`` and ``second`` are they."""

    def __init__(self, question: int, first: int, second: int) -> None:
        super().__init__(question, first, second)
        self.question, self.first, self.second = question, first, second


def encode_questions(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    questions: Sequence[tuple[str, Sequence[str]]],
    end: int,
) -> list[EncodedQuestion]:
    """Prompts of questions, each a wording with its labels, about one conversation.

    The question stands behind the last message, if that is the user's, else in a message of its
    own. ``end`` is the token that ends an answer. Takes milliseconds and more: call it on a worker
    thread. Raises SameLabels, and InvalidRequest where the chat template refuses the messages.
    """
    before, after = _around(tokenizer, messages)
    questions = [
        (tokenizer.as_text(wording), [tokenizer.as_text(label) for label in labels])
        for wording, labels in questions
    ]
    tails: list[tuple[int, ...]] = []
    trees: list[LabelTree] = []
    for index, (wording, labels) in enumerate(questions):
        # Long ones are not kept: clients decide how long they are.
        encode = _encoded_tail if len(wording) < _LONG else _encoded_tail.__wrapped__
        try:
            tail, tree = encode(tokenizer, after, wording, tuple(labels), end)
        except ValueError as error:
            raise SameLabels(index, *error.args[0]) from error
        tails.append(tail)
        trees.append(tree)
    texts = [_tail(wording, after) for wording, _ in questions]
    shared, whole = tokenizer.encode_rendered([before, before + texts[0]])
    if shared + tails[0] == whole:
        prompts = [shared + tail for tail in tails]
    else:
        # This tokenizer joins the input's end with the line breaks behind it.
        prompts = tokenizer.encode_rendered([before + text for text in texts])
    return [EncodedQuestion(*each) for each in zip(prompts, trees, strict=True)]


def _tail(wording: str, after: str) -> str:
    return f"\n\n{wording}{after}"


@functools.lru_cache(maxsize=_TAILS_KEPT)
def _encoded_tail(
    tokenizer: Tokenizer, after: str, wording: str, labels: tuple[str, ...], end: int
) -> tuple[tuple[int, ...], LabelTree]:
    """A question behind an input as ids, and its labels as the tokens that they are behind it.

    Raises ValueError as LabelTree does.
    """
    tail, start, *both = tokenizer.encode_rendered(
        [_tail(wording, after), after, *(after + label for label in labels)]
    )
    if all(ids[: len(start)] == start for ids in both):
        tokens = [ids[len(start) :] for ids in both]
    else:
        tokens = tokenizer.encode_rendered(list(labels))
    return tail, LabelTree(tokens, end)


def _around(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """The rendered text before and behind a question at the end of the conversation."""
    *others, last = messages
    if last["role"] == "user":
        asked = [*others, {"role": "user", "content": f"{last['content'].rstrip()}{_MARK}"}]
    else:
        asked = [*messages, {"role": "user", "content": _MARK}]
    before, _, after = tokenizer.render_chat(asked).rpartition(_MARK)
    return before, after


def confidence(probabilities: Sequence[float]) -> float:
    """1 - entropy / log(n): 0 where all answers are alike, 1 where one is certain."""
    entropy = -math.fsum(p * math.log(p) for p in probabilities if p > 0)
    return min(1.0, max(0.0, 1.0 - entropy / math.log(len(probabilities))))


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities of ``logits``."""
    return [math.exp(each) for each in _log_softmax(logits)]


def _log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(each - top) for each in logits))
    return [each - total for each in logits]
