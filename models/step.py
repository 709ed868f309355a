"""One step of the engine as plain data: what to run and what came of it.

A decoder writes steps, the runner carries them out. Nothing here holds a tensor, so a step can be
made, checked and replayed without torch.

A *row* is an index into the runner's hidden buffer: the hidden state of one position of one
sequence while that position is inside the stack, or owes layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from offramp.kernels.noise import TokenNoise
from offramp.models.sampling_params import ExitCriterion, KVFill, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Pooling(StrEnum):
    """What stands for a whole prompt: the mean of its positions' states, or the last one's."""

    MEAN = "mean"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class HeadRow:
    """A row that needs a token.

    ``tokens`` are prompt and answer so far, the first ``num_prompt`` of them prompt; penalties
    read them. ``index`` counts the answer's tokens and picks the random draw. ``mask`` holds a bit
    for each token that may be chosen (int32 words, lowest bit first; None: all may).
    """

    row: int
    sampling: SamplingParams
    index: int
    tokens: Sequence[int]
    num_prompt: int
    mask: NDArray[np.int32] | None = None

    @property
    def adjusts_logits(self) -> bool:
        """Whether plain argmax over what the model says is not enough."""
        return self.mask is not None or self.sampling.adjusts_logits

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return self.sampling.temperature == 0 and not self.needs_logits

    @property
    def needs_logits(self) -> bool:
        """Whether the place of the largest logit, or of the largest with noise, is not enough."""
        sampling = self.sampling
        filters = sampling.temperature > 0 and sampling.filters_tokens
        return self.adjusts_logits or filters or sampling.logprobs is not None

    @property
    def noise(self) -> TokenNoise | None:
        """What makes the token random; None if it is not."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return None
        return TokenNoise(sampling.temperature, sampling.seed, self.index)


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row of a prompt, whose next ``token`` is known: its log-probability is wanted.

    ``top`` is the number of best tokens that are wanted beside it.
    """

    row: int
    token: int
    top: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of a token, before penalties, masks and temperature.

    ``top`` are the ids of the best tokens with theirs, the best first. ``rank`` is 1 for the best.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ExitCheck:
    """A sequence's last row may leave after a segment where its score reaches ``threshold``.

    ``head`` says how the exit's token is chosen then.
    """

    criterion: ExitCriterion
    threshold: float
    head: HeadRow


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Ascending positions of one sequence and the rows that hold them.

    ``table`` lists the sequence's K,V blocks in order of position. ``token_ids`` (first segment
    only) are the tokens to embed. ``check`` concerns the last row. ``prompt_threshold`` is the gate
    score at which any of the first ``prompt_rows`` rows, all of the prompt, leave. Layers take
    inputs of 8 bits of ``coarse`` rows.
    """

    positions: Sequence[int]
    rows: tuple[int, ...]
    table: Sequence[int]
    token_ids: tuple[int, ...] = ()
    check: ExitCheck | None = None
    prompt_threshold: float | None = None
    prompt_rows: int = 0
    coarse: bool = False


@dataclass(frozen=True, slots=True)
class RunSegments:
    """Run the segments ``first`` to ``last`` over the rows of several sequences.

    Nothing is decided in between: checks and prompt thresholds concern the last one. After the top
    segment the LM head makes a token of each row in ``head``, and reads the rows in ``scored``.
    """

    first: int
    last: int
    work: tuple[SequenceRows, ...]
    head: tuple[HeadRow, ...] = ()
    scored: tuple[ScoredRow, ...] = ()


@dataclass(frozen=True, slots=True)
class OwedRows:
    """Debts of one sequence at ``positions``.

    They left after segment ``segment - 1``, so they lack K,V from segment ``segment`` up.
    """

    segment: int
    positions: Sequence[int]
    rows: tuple[int, ...]
    table: Sequence[int]


@dataclass(frozen=True, slots=True)
class FillKV:
    """Make the K,V of skipped layers for many positions in one launch."""

    method: KVFill
    work: tuple[OwedRows, ...]


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Entries that the draft head makes for one sequence, and how many guesses it may add.

    The entry at each of ``positions`` is made of its token and of the stack's states one position
    before, which are in ``rows`` (-1: there are none). ``table`` lists the sequence's K,V blocks;
    those before the ``first_block``-th hold no entries. ``noise`` is that of the first guess where
    the sequence's tokens are random; those behind it have the indices behind its. Guesses are right
    ``luck`` times as often as their chance says.
    """

    positions: range
    token_ids: tuple[int, ...]
    rows: tuple[int, ...]
    table: Sequence[int]
    first_block: int = 0
    guesses: int = 0
    noise: TokenNoise | None = None
    luck: float = 1.0


@dataclass(frozen=True, slots=True)
class Draft:
    """Let the draft head guess what follows the last entry of each sequence.

    A sequence's guesses end where the product of their chances, times its luck each, falls below
    ``bound``.
    """

    work: tuple[DraftRows, ...]
    bound: float


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Ascending positions of a prompt; ``token_ids`` are theirs (first segment only).

    Layers take inputs of 8 bits of ``coarse`` ones.
    """

    positions: Sequence[int]
    table: Sequence[int]
    token_ids: tuple[int, ...] = ()
    coarse: bool = False


@dataclass(frozen=True, slots=True)
class AnswerRead:
    """The end of a prompt, where the logits of an answer's ``candidates`` (token ids) are wanted.

    ``table`` lists the prompt's blocks; its last position is the last one of the step's rows of
    ``work``. ``task`` names the heads to ask, whose outputs then stand for the candidates; without
    one the LM head is asked, above the last segment. With ``pooling`` nobody is asked: the read is
    an embedding, the prompt's states behind the final norm pooled into one.
    """

    work: int
    table: Sequence[int]
    length: int
    candidates: tuple[int, ...]
    task: str | None = None
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class Decide:
    """Run one segment of the decisions' own over parts of prompts, and read answers after it.

    A part ends where a block ends, or the prompt. The states are kept until the next segment.
    ``copies`` are blocks that begin like another, each as source, target and number of positions:
    the target gets the source's K,V of the segment's layers, and above the last segment its states.
    """

    segment: int
    work: tuple[PromptRows, ...]
    reads: tuple[AnswerRead, ...]
    copies: tuple[tuple[int, int, int], ...] = ()


Step = RunSegments | FillKV | Draft | Decide


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of a step.

    ``seconds`` is time on the device; of it ``segment_seconds`` were spent on each segment,
    ``check_seconds`` on exit checks and ``head_seconds`` on the LM head and sampling. ``leave``:
    for each sequence whether its last row's score reached the threshold, ``scores`` that score
    (None without a check) and ``token_ids`` the exit's token, -1 where it does not leave; all empty
    after the top segment. ``prompt_left``: for each sequence the indices of its prompt rows that
    left, empty where none may. ``head_tokens``: one for each row of the step's head, with
    ``head_logprobs`` where any are wanted, and ``scored`` those of the step's scored rows;
    ``exit_logprobs`` are those of ``token_ids``.
    ``exit_head_rows`` are rows an exit's LM head was run for. ``guesses`` and ``chances``: for each
    sequence of a draft its guesses, and the chance of each; of ``guess_seconds`` the first are
    until the first guesses, the others for the rest. ``logits``: for each read of a decision those
    of its candidates, for an embedding its d numbers.
    """

    seconds: float
    segment_seconds: tuple[float, ...] = ()
    check_seconds: float = 0.0
    head_seconds: float = 0.0
    leave: tuple[bool, ...] = ()
    token_ids: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()
    prompt_left: tuple[tuple[int, ...], ...] = ()
    head_tokens: tuple[int, ...] = ()
    head_logprobs: tuple[TokenLogprobs | None, ...] = ()
    exit_logprobs: tuple[TokenLogprobs | None, ...] = ()
    scored: tuple[TokenLogprobs, ...] = ()
    exit_head_rows: int = 0
    guesses: tuple[tuple[int, ...], ...] = ()
    chances: tuple[tuple[float, ...], ...] = ()
    guess_seconds: tuple[float, float] = (0.0, 0.0)
    logits: tuple[tuple[float, ...], ...] = ()


class StepRunner(Protocol):
    """What carries steps out: models.runner.Runner, or a fake in tests."""

    def run(self, step: Step) -> StepResult:
        """Run one step to its end."""
        ...
