"""Full depth's choices against tokens that were guessed, and against those that left early."""

from __future__ import annotations

from offramp.models.sampling_params import TokenSource
from offramp.server.engine.drafting import Drafting
from offramp.server.engine.governor import ExitGovernor
from offramp.server.engine.sequence import Sequence


def verify(
    sequence: Sequence, chosen: list[int], governor: ExitGovernor, drafting: Drafting
) -> list[int]:
    """The tokens that are now verified, of ``chosen`` for the rows of the sequence's chunk.

    Drafts are compared one after another; the first wrong one is replaced and all behind it
    are forgotten, with their K,V. Of an audit, which runs behind a finished answer, none is new.
    """
    if sequence.audit:
        _compare_answer(sequence, chosen, governor)
        return []
    verified: list[int] = []
    for place, (position, token) in enumerate(zip(sequence.chunk, chosen, strict=True)):
        verified.append(token)
        if position + 1 < len(sequence.tokens):
            right = sequence.tokens[position + 1] == token
            _learn(sequence, position + 1, governor, agreed=right)
            drafting.verified(sequence, place, right=right)
            if right:
                sequence.drafts -= 1
                continue
            sequence.drop_drafts(position + 1)
        sequence.tokens.append(token)
        break
    return verified


def token_sources(
    sequence: Sequence, count: int, accepted: int, *, stayed: bool
) -> tuple[TokenSource, ...]:
    """Sources of ``count`` new tokens, ``accepted`` drafts first; empty if all are the model's."""
    if not accepted and not stayed:
        return ()
    own = TokenSource.STAYED if stayed else TokenSource.MODEL
    drafted = TokenSource(sequence.source)
    return tuple(drafted if index < accepted else own for index in range(count))


def _compare_answer(sequence: Sequence, chosen: list[int], governor: ExitGovernor) -> None:
    # The row behind the answer's last token makes one more, which is not part of it.
    for position, token in zip(sequence.chunk, chosen, strict=True):
        if position + 1 < len(sequence.tokens):
            agreed = sequence.tokens[position + 1] == token
            sequence.rejected += not agreed
            _learn(sequence, position + 1, governor, agreed=agreed)


def _learn(sequence: Sequence, index: int, governor: ExitGovernor, *, agreed: bool) -> None:
    """Full depth verified a token that may have left early: its ``index`` in the text."""
    left = sequence.scores.pop(index, None)
    if left is None:
        return
    if sequence.lossless:
        governor.observe_draft(left[0], right=agreed)
    online = governor.thresholds.online
    if online is not None:
        online.add(*left, agreed=agreed)
