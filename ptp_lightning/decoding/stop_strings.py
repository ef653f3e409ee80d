"""StopStrings: ends a text before the first of several strings."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Reads a text piece by piece, and holds back what may be the beginning of a stop string.

    Args:
        strings: one or several, none of them empty.

    Attributes:
        found: whether a stop string has appeared; the text after it is ignored.

    Raises:
        ValueError: a string is empty, or something else than a string.

    >>> stop = StopStrings(["END"])
    >>> [stop.push(piece) for piece in ("one E", "T two E", "ND three")]
    ['one ', 'ET two ', '']
    >>> stop.found
    True
    """

    def __init__(self, strings: str | Sequence[str]) -> None:
        self._strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not all(isinstance(string, str) and string for string in self._strings):
            raise ValueError(f"expected stop strings of at least one character, found {[*self._strings]}: set stop")
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Read a piece; returns the text that is certain and was not returned before, up to the first stop string."""
        if self.found:
            return ""
        text = self._held + piece
        positions = [position for string in self._strings if (position := text.find(string)) >= 0]
        if positions:
            self.found, self._held = True, ""
            return text[: min(positions)]
        num_certain = len(text) - max((self._partial_match(string, text) for string in self._strings), default=0)
        self._held = text[num_certain:]
        return text[:num_certain]

    def flush(self) -> str:
        """The text that was held back, for a text that ends without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _partial_match(string: str, text: str) -> int:
        """Length of the longest proper prefix of `string` that `text` ends with."""
        longest = min(len(string) - 1, len(text))
        return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)
