"""What the two processes write to each other arrives as it was sent."""

from __future__ import annotations

import pytest

from offramp.models.sampling_params import DraftSource, TokenSource
from offramp.models.step import TokenLogprobs
from offramp.server.engine.frames import Beat, Ending, FrameReader, frame, output_frame, read
from offramp.server.engine.request import (
    AnswerResult,
    EngineOutput,
    FinishReason,
    RequestStats,
    StepStats,
    TokenEvent,
)

FULL = TokenEvent(
    "cmpl-1",
    (5, 6),
    (20, 30),
    RequestStats(1.0, 2.0, 3.0, 4.0, 10, 4, 2, 50, 3, 1, 2, {DraftSource.HEAD: (3, 2)}, 1, 1),
    FinishReason.ERROR,
    "an error",
    (AnswerResult((0.5, 0.25), 12),),
    (TokenLogprobs(-1.0, 2, ((7, -0.5),)),),
    (TokenLogprobs(-2.0, 1, ()),),
    (TokenSource.MODEL, TokenSource.HEAD),
)
STEP = StepStats(
    "segments", 2, 0.5, drafted={DraftSource.HEAD: 3}, accepted_at={0: 2}, segment_queue=(1, 0, 2)
)
OUTPUTS = [
    EngineOutput((FULL, TokenEvent("cmpl-2", (), (), RequestStats(1.0))), STEP),
    EngineOutput((), StepStats("idle", 0)),
    EngineOutput((TokenEvent("cmpl-3", (1,), (30,), RequestStats(2.0)),)),
    EngineOutput(),
]


def test_outputs_arrive_with_every_field() -> None:
    reader = FrameReader()
    (found,) = reader.feed(output_frame(OUTPUTS))
    assert found == OUTPUTS
    event = found[0].events[0]
    assert isinstance(event, TokenEvent)
    assert isinstance(event.stats, RequestStats)
    assert event.finish_reason is FinishReason.ERROR
    assert event.stats.drafted == 3
    assert isinstance(found[0].stats, StepStats)


def test_no_outputs_are_a_message_too() -> None:
    assert list(FrameReader().feed(output_frame([]))) == [[]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1 << 20])
def test_messages_do_not_depend_on_how_their_bytes_come(size: int) -> None:
    messages = [Beat(0.5), Ending("why", misconfigured=True), "abort-1", None]
    sent = b"".join(map(frame, messages)) + output_frame(OUTPUTS) + frame(Beat(1.0))
    reader = FrameReader()
    found = [
        message
        for start in range(0, len(sent), size)
        for message in reader.feed(sent[start : start + size])
    ]
    assert found == [*messages, OUTPUTS, Beat(1.0)]


def test_half_a_message_is_none() -> None:
    reader = FrameReader()
    sent = frame(Beat(0.25))
    assert list(reader.feed(sent[:-1])) == []
    assert list(reader.feed(sent[-1:] + sent[:3])) == [Beat(0.25)]
    assert list(reader.feed(sent[3:])) == [Beat(0.25)]
    assert read(sent[4:]) == Beat(0.25)
