"""StopStrings: ends a text where one of several strings appears in it."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Reads a text piece by piece, and holds back what may be the beginning of a stop string.

    Args:
        strings: none of them empty.

    Attributes:
        found: whether one of them has appeared; nothing is read from then on.

    Raises:
        ValueError: one is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise ValueError(f"expected stop strings of at least one character, found {list(strings)}: set stop")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What is settled of the text so far and has not been given out: it ends before the first stop string."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        settled = len(text) - max((self._beginning(string, text) for string in self._strings), default=0)
        self._held = text[settled:]
        return text[:settled]

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(string: str, text: str) -> int:
        """Length of the longest beginning of `string` that `text` ends with."""
        longest = min(len(string) - 1, len(text))
        return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)
