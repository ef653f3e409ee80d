"""TextLookup: what followed the last tokens of a text where they occurred before.

It is a draft that needs no network. This is prompt lookup decoding (Saxena 2023, `prompt_lookup_num_tokens`
in transformers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_MATCH = 6
"""Of several places, that with the longest match counts, then the latest; longer matches say no more than this one."""


class Match(NamedTuple):
    """An earlier occurrence of the last tokens of a text.

    Attributes:
        length: number of these tokens, up to `MAX_MATCH`.
        follower: the token that followed them.
    """

    length: int
    follower: int


class TextLookup:
    """A text that grows, and which token last followed each sequence of up to `MAX_MATCH` of its tokens.

    Args:
        tokens: the text so far.

    >>> text = TextLookup([1, 2, 3, 9, 4, 1, 2])
    >>> text.longest_match()
    Match(length=2, follower=3)
    >>> text.longest_match(path=[3, 9])
    Match(length=4, follower=4)
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, token: int) -> None:
        """Append a token to the text."""
        tail = self.tail()
        for start in range(len(tail)):
            self._followers[tail[start:]] = token
        self._tokens.append(token)

    def tail(self, path: Sequence[int] = ()) -> tuple[int, ...]:
        """The last `MAX_MATCH` tokens of the text and a path after it."""
        return (*self._tokens[-MAX_MATCH:], *path)[-MAX_MATCH:]

    def longest_match(self, path: Sequence[int] = ()) -> Match | None:
        """The longest match of the last tokens of the text and a path after it; None if the last one is new."""
        tail = self.tail(path)
        for start in range(len(tail)):
            follower = self._followers.get(tail[start:])
            if follower is not None:
                return Match(len(tail) - start, follower)
        return None
