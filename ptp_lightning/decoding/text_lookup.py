"""TextLookup: where the last tokens of a text occurred before, and what followed them there.

What followed is a draft that needs no network. This is prompt lookup decoding (Saxena 2023, `prompt_lookup_num_tokens`
in transformers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_MATCH = 6
"""Of several places, that with the longest match counts; a longer match says no more than this one."""


class Match(NamedTuple):
    """An earlier occurrence of the last tokens of a text.

    Attributes:
        length: number of these tokens, up to `MAX_MATCH`.
        end: index of the token that followed them.
    """

    length: int
    end: int


class TextLookup:
    """A text that grows, and where each sequence of up to `MAX_MATCH` of its tokens was last followed by another.

    Args:
        tokens: the text so far.

    >>> text = TextLookup([1, 2, 3, 9, 4, 1, 2])
    >>> text.longest_match()
    Match(length=2, end=2)
    >>> text.copy(text.longest_match(), size=3)
    [3, 9, 4]
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(1, min(MAX_MATCH, end) + 1):
                self._ends[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def longest_match(self) -> Match | None:
        """The longest match of the last tokens, of several the latest; None if the last token is new."""
        for length in range(min(MAX_MATCH, len(self._tokens)), 0, -1):
            end = self._ends.get(tuple(self._tokens[-length:]))
            if end is not None:
                return Match(length, end)
        return None

    def copy(self, match: Match, size: int) -> list[int]:
        """The `size` tokens that followed; in a text that goes round in circles, the copy goes on with itself."""
        period = len(self._tokens) - match.end
        return [self._tokens[match.end + offset % period] for offset in range(size)]
