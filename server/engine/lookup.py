"""Guess the next tokens by looking the last few up in the text so far.

(Prompt lookup decoding; the same idea as LLMA, arXiv 2304.04487.) Answers that quote their prompt
or repeat themselves are guessed for nothing; verification keeps the output exact.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 3, 2


class PromptLookup:
    """Where each n-gram of a growing text last ended, so that a lookup costs nothing.

    It must be shown verified tokens only: what it has read is never taken back.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], int] = {}
        self._length = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to ``count`` tokens that followed the last occurrence of the text's end before."""
        self._read(tokens)
        if count < 1:
            return []
        for size in range(_LONGEST, _SHORTEST - 1, -1):
            if len(tokens) > size:
                end = self._seen.get(tuple(tokens[len(tokens) - size :]))
                if end is not None:
                    return list(tokens[end : end + count])
        return []

    def _read(self, tokens: Sequence[int]) -> None:
        """Index all n-grams but the text's last ones, which would only find themselves."""
        for end in range(max(self._length, _SHORTEST), len(tokens)):
            for size in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._seen[tuple(tokens[end - size : end])] = end
        self._length = max(self._length, len(tokens))
