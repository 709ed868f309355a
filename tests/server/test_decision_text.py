"""Wording of questions, and the places in the model's output where their answers are told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.pre_tokenizers import ByteLevel

from offramp.server.errors import InvalidRequest
from offramp.server.text.decisions import (
    LabelTree,
    Option,
    Question,
    QuestionKind,
    SameLabels,
    confidence,
    encode_questions,
    predicate,
    score,
    softmax,
)
from offramp.server.text.tokenizer import Tokenizer
from tests.server.fakes import byte_backend, render

END = 0
LINE = "Ċ"


def choice(*options: Option) -> Question:
    return Question(QuestionKind.CHOICE, "What is it about?", options)


@pytest.mark.parametrize(
    ("question", "wording"),
    [
        (
            predicate(" It is a question. "),
            "Is the following true? It is a question.\nAnswer with yes or no.",
        ),
        (
            predicate("It is big.", "more than a cat", ""),
            "Is the following true? It is big.\nyes: more than a cat\nno\nAnswer with yes or no.",
        ),
        (
            choice(Option("sport"), Option("art"), Option("trade")),
            "What is it about?\nAnswer with sport, art or trade.",
        ),
        (
            choice(Option("sport"), Option("art", "pictures and books")),
            "What is it about?\nsport\nart: pictures and books\nAnswer with sport or art.",
        ),
        (
            score("How good is it?", ["bad", "fair", "good"]),
            "How good is it?\n0: bad\n1: fair\n2: good\nAnswer with a number from 0 to 2.",
        ),
    ],
)
def test_wording(question: Question, wording: str) -> None:
    assert question.wording == wording


def reads_of(*labels: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(read.path, read.candidates) for read in LabelTree(labels, END).reads]


def test_labels_that_differ_at_once_need_one_read() -> None:
    assert reads_of([5, 9], [6], [4, 9, 9]) == [((), (5, 6, 4))]


def test_labels_that_differ_late_are_read_behind_what_they_share() -> None:
    assert reads_of([5, 9, 1], [5, 9, 2]) == [((5, 9), (1, 2))]


def test_branches_are_read_one_by_one() -> None:
    tree = [((), (5, 7)), ((5,), (1, 2)), ((5, 2), (3, 4))]
    assert reads_of([5, 1], [7], [5, 2, 3], [5, 2, 4]) == tree


def test_a_label_that_begins_another_ends_there() -> None:
    assert reads_of([5], [5, 6], [7]) == [((), (5, 7)), ((5,), (END, 6))]
    assert reads_of([5, 6, 7], [5, 6], [5]) == [((5,), (6, END)), ((5, 6), (7, END))]


@pytest.mark.parametrize(
    ("labels", "pair"),
    [
        ([[1], [2], [1]], (0, 2)),
        ([[1, 2], [3], [4], [3]], (1, 3)),
        # Another label begins with them.
        ([[1], [1], [1, 2]], (0, 1)),
        ([[1, 2], [1], [3], [1]], (1, 3)),
        # What is behind the end of an answer is never read.
        ([[1], [1, END]], (0, 1)),
        ([[1, END], [1]], (0, 1)),
        ([[1], [1, END, 2], [1, 3]], (0, 1)),
    ],
)
def test_equal_labels_are_named(labels: Sequence[Sequence[int]], pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\(") as caught:
        LabelTree(labels, END)
    assert caught.value.args == (pair,)


def test_a_label_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="1"):
        LabelTree([[1], []], END)


VOCAB = 4
LABELS = st.lists(
    st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=4).map(tuple),
    min_size=2,
    max_size=9,
    unique=True,
)


def constrained(labels: Sequence[tuple[int, ...]], seed: int) -> list[float]:
    """Probabilities of all answers of a model that may only say a label and then end."""
    answers = [(*label, END) for label in labels]

    def following(path: tuple[int, ...]) -> set[int]:
        return {answer[len(path)] for answer in answers if answer[: len(path)] == path}

    found = []
    for answer in answers:
        chance = 1.0
        for length in range(len(answer)):
            path, logits = answer[:length], logits_at(answer[:length], seed)
            allowed = following(path)
            total = math.fsum(math.exp(logits[token]) for token in allowed)
            chance *= math.exp(logits[answer[length]]) / total
        found.append(chance)
    return found


def logits_at(path: tuple[int, ...], seed: int) -> list[float]:
    """What a model without meaning says behind a path."""
    return [5 * math.sin(hash((*path, token, seed)) % 10_007) for token in range(VOCAB)]


@given(labels=LABELS, seed=st.integers(0, 9))
def test_probabilities_are_those_of_an_answer_that_may_only_be_a_label(
    labels: list[tuple[int, ...]], seed: int
) -> None:
    tree = LabelTree(labels, END)
    logits = []
    for read in tree.reads:
        own = logits_at(read.path, seed)
        logits.append([own[token] for token in read.candidates])
    found = tree.probabilities(logits)
    assert math.fsum(found) == pytest.approx(1)
    assert found == pytest.approx(constrained(labels, seed))


@given(st.lists(st.floats(-800, 800), min_size=2, max_size=6))
def test_softmax_of_any_logits_is_finite(logits: list[float]) -> None:
    found = softmax(logits)
    assert math.fsum(found) == pytest.approx(1)
    assert logits[found.index(max(found))] == pytest.approx(max(logits))


def test_confidence_is_one_without_doubt_and_zero_without_a_clue() -> None:
    assert confidence([0.0, 1.0, 0.0]) == 1
    assert confidence([0.25] * 4) == pytest.approx(0, abs=1e-12)
    assert confidence([0.5, 0.5, 0.0, 0.0]) == pytest.approx(0.5)
    assert confidence([1 / 3] * 3) >= 0


def joining_backend() -> Backend:
    """Bytes, and tokens of a letter with the line break behind it."""
    pairs = [(letter, LINE) for letter in "tgo"]
    pairs.append((LINE, LINE))
    tokens = ["<end>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    return backend


def chat_text(messages: Sequence[Mapping[str, str]]) -> str:
    return render(messages) + "assistant:"


QUESTIONS = [
    ("Is it so?", ("yes", "no")),
    ("How much?", ("0", "1", "10")),
    ("Who?", ("we", "wet", "you")),
]


@pytest.mark.parametrize("backend", [byte_backend(), joining_backend()], ids=["bytes", "joining"])
@pytest.mark.parametrize("content", ["A cat. ", "What a cat", "\n\n"])
def test_prompts_are_the_tokens_of_the_whole_text(backend: Backend, content: str) -> None:
    """Also where the input's last letter and the line break behind it are one token."""
    tokenizer = Tokenizer(backend, chat_text)
    messages = [{"role": "system", "content": "Be good"}, {"role": "user", "content": content}]
    found = encode_questions(tokenizer, messages, QUESTIONS, END)
    for own, (wording, labels) in zip(found, QUESTIONS, strict=True):
        asked = f"{content.rstrip()}\n\n{wording}"
        text = f"system:Be good\nuser:{asked}\nassistant:"
        assert own.prompt == tuple(backend.encode(text).ids)
        first = {backend.encode(label).ids[0] for label in labels}
        assert set(own.tree.reads[0].candidates) == first
    assert [len(own.tree.reads) for own in found] == [1, 2, 2]


def test_one_of_those_tokenizers_joins_them_and_the_other_does_not() -> None:
    """So that the test above is of both."""
    apart = [len(byte_backend().encode(text).ids) for text in ("cat", "\n\n", "cat\n\n")]
    joined = [len(joining_backend().encode(text).ids) for text in ("cat", "\n\n", "cat\n\n")]
    assert apart == [3, 2, 5]
    assert joined == [3, 1, 4]
    assert len(joining_backend().encode("cat\n").ids) == 3


def labels_behind(backend: Backend) -> tuple[int, ...]:
    """The tokens that tell yes from no behind a prompt."""
    tokenizer = Tokenizer(backend, chat_text)
    message = {"role": "user", "content": "hi"}
    (found,) = encode_questions(tokenizer, [message], [("So?", ("yes", "no"))], END)
    return found.tree.reads[0].candidates


def test_labels_are_the_tokens_that_they_are_behind_the_prompt() -> None:
    """A tokenizer may mark where a text begins."""
    backend = byte_backend()
    backend.normalizer = Prepend("_")
    alone = [backend.encode(label).ids for label in ("yes", "no")]
    assert alone[0][0] == alone[1][0]
    assert labels_behind(backend) == (alone[0][1], alone[1][1])


def test_a_label_that_grows_together_with_the_prompt_stands_alone() -> None:
    """The prompt's last token cannot be taken back."""
    pairs = [(":", "y"), ("y", "e")]
    tokens = ["<end>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    backend = Backend(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    assert len(backend.encode(":yes").ids) == 3
    assert labels_behind(backend) == (tokens.index("ye"), tokens.index("n"))


def test_behind_an_answer_the_question_is_a_message_of_its_own() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]
    tokenizer = Tokenizer(byte_backend(), chat_text)
    (found,) = encode_questions(tokenizer, messages, QUESTIONS[:1], END)
    text = "user:hi\nassistant:Hello\nuser:\n\nIs it so?\nassistant:"
    assert found.prompt == tuple(byte_backend().encode(text).ids)


def test_equal_answers_are_named_with_their_question() -> None:
    tokenizer = Tokenizer(byte_backend(), chat_text)
    message = {"role": "user", "content": "hi"}
    questions = [("So?", ("yes", "no")), ("Who?", ("you", "we", "you", "wet"))]
    with pytest.raises(SameLabels) as caught:
        encode_questions(tokenizer, [message], questions, END)
    assert (caught.value.question, caught.value.first, caught.value.second) == (1, 0, 2)


def test_a_template_may_refuse_the_messages() -> None:
    def refuse(messages: Sequence[Mapping[str, str]]) -> str:
        raise ValueError("no")

    tokenizer = Tokenizer(byte_backend(), refuse)
    with pytest.raises(InvalidRequest, match="refuses"):
        encode_questions(tokenizer, [{"role": "user", "content": "a"}], QUESTIONS, END)


@pytest.mark.parametrize("count", [2, 3])
def test_any_two_labels_that_differ_can_be_told_apart(count: int) -> None:
    texts = [text for size in (1, 2, 3) for text in product((1, 2), repeat=size)]
    for labels in product(texts, repeat=count):
        if len(set(labels)) == count:
            LabelTree(labels, END)
        else:
            with pytest.raises(ValueError, match=r"\("):
                LabelTree(labels, END)


def test_names_of_special_tokens_in_questions_are_text() -> None:
    """As they are in messages."""
    backend = byte_backend()
    tokenizer = Tokenizer(backend, chat_text)
    message = {"role": "user", "content": "a <end>"}
    questions = [("Is it <end> so?", ("<end>", "no", "<end>ed"))]
    (found,) = encode_questions(tokenizer, [message], questions, END)
    assert END not in found.prompt
    bracket = backend.encode("<").ids[0]
    assert found.tree.reads[0].candidates == (bracket, backend.encode("n").ids[0])
    text = "user:a <end>\n\nIs it <end> so?\nassistant:"
    spelled = [backend.encode(letter).ids[0] for letter in text]
    assert found.prompt == tuple(spelled)
    special = Tokenizer(backend, chat_text, special_in_messages=True)
    (found,) = encode_questions(special, [message], [("Is it <end> so?", ("yes", "no"))], END)
    assert found.prompt.count(END) == 2
