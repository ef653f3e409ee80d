"""TextLookup: drafts without a network, from what followed the last tokens of a text where they occurred before.

This is prompt lookup decoding (Saxena 2023, `prompt_lookup_num_tokens` in transformers), which looks in the new text as
well. Texts that quote their prompt, code and lists repeat themselves often, and students learn little about that.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_MATCH = 2
"""Tokens that must occur before. After a single one, what follows is rarely the same."""
MAX_MATCH = 6
"""Of several places, that with the longest match counts; a longer match says no more than this one."""
MAX_COPIED = 10
"""Tokens of a draft. A call that reads more takes longer, and few drafts are right that far."""


class TextLookup:
    """The prompts and new tokens of B texts.

    After a draft without a correct token, a text needs a match that is one token longer, until a draft has one again.
    So texts that do not repeat themselves are spared drafts that cost a call and save none.

    Args:
        prompts: token ids of all texts, at least one each.

    >>> lookup = TextLookup([[1, 2, 3, 9, 4, 5]])
    >>> lookup.draft(0, [1, 2], size=3)  # 1, 2 was followed by 3, 9, 4
    [3, 9, 4]
    >>> lookup.draft(0, [1, 2, 7], size=3)
    []
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._texts = [_Text(prompt) for prompt in prompts]

    def draft(self, text: int, new: Sequence[int], size: int) -> list[int]:
        """Tokens that may follow a text; empty if its last tokens do not occur before.

        Args:
            text: index of the prompt.
            new: all new tokens of the text; those of earlier calls are its beginning.
            size: the largest number of tokens.
        """
        return self._texts[text].draft(new, min(size, MAX_COPIED))

    def learn(self, text: int, num_correct: int) -> None:
        """Take note of how many tokens of the latest draft of a text were correct."""
        self._texts[text].learn(num_correct)


class _Text:
    """One text: its tokens, and where each sequence of `MIN_MATCH` to `MAX_MATCH` of them was last followed by one."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # index of the token after the latest occurrence
        self._num_prompt = len(prompt)
        self._needed = MIN_MATCH
        self._append(prompt)

    def draft(self, new: Sequence[int], size: int) -> list[int]:
        self._append(new[len(self._tokens) - self._num_prompt :])
        for length in range(MAX_MATCH, self._needed - 1, -1):
            start = self._after.get(tuple(self._tokens[-length:]))
            if start is not None:
                # In a text that goes round in circles, the copy goes on with what it has copied.
                period = len(self._tokens) - start
                return [self._tokens[start + offset % period] for offset in range(size)]
        return []

    def learn(self, num_correct: int) -> None:
        self._needed = MIN_MATCH if num_correct else min(self._needed + 1, MAX_MATCH)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for length in range(MIN_MATCH, min(MAX_MATCH, end) + 1):
                self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)
