"""TextLookup: drafts without a network, from what followed the last tokens of a text where they occurred before.

This is prompt lookup decoding (Saxena 2023, `prompt_lookup_num_tokens` in transformers), which looks in the new text as
well. Texts that quote their prompt, code and lists repeat themselves often, and students learn little about that.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_MATCH = 6
"""Of several places, that with the longest match counts; a longer match says no more than this one."""
MAX_COPIED = 10
"""Tokens of a draft. A call that reads more takes longer, and few drafts are right that far."""
EXPECTED_TOKENS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
"""New tokens of a copying cycle after a match of 1, 2, .. tokens, until it is known better. Chats of SmolLM2 at
temperature 0.7 have about as many."""
EXPECTED_TOKENS_PER_CALL = 1.3
"""Of cycles without a copy, likewise."""
LEARNING_RATE = 0.1
"""How fast the numbers of a text replace these."""


class TextLookup:
    """The prompts and new tokens of B texts.

    A draft is copied where that is expected to write more tokens a call than a cycle without: the averages of a text so
    far decide, for each length of the match. So a good student is not interrupted by poor copies, and at high
    temperatures, where texts do not repeat themselves, only long matches are copied.

    Args:
        prompts: token ids of all texts, at least one each.
        other_cost: what a cycle without a copy costs, in calls of the base model.

    >>> lookup = TextLookup([[1, 2, 3, 9, 4, 5]], other_cost=1.0)
    >>> lookup.draft(0, [1, 2], size=3)  # 1, 2 was followed by 3, 9, 4
    [3, 9, 4]
    >>> lookup.draft(0, [1, 2, 7], size=3)
    []
    """

    def __init__(self, prompts: Sequence[Sequence[int]], other_cost: float) -> None:
        self._texts = [_Text(prompt, other_cost) for prompt in prompts]

    def draft(self, text: int, new: Sequence[int], size: int) -> list[int]:
        """Tokens that may follow a text; empty if its last token does not occur before, or a copy is not worth a call.

        Args:
            text: index of the prompt.
            new: all new tokens of the text; those of earlier calls are its beginning.
            size: the largest number of tokens.
        """
        return self._texts[text].draft(new, min(size, MAX_COPIED))

    def learn(self, text: int, num_tokens: int, is_copied: bool) -> None:
        """Take note of how many new tokens the latest cycle of a text wrote, and whether it copied `draft`."""
        self._texts[text].learn(num_tokens, is_copied)


class _Text:
    """One text: its tokens, and where each sequence of up to `MAX_MATCH` of them was last followed by another."""

    def __init__(self, prompt: Sequence[int], other_cost: float) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # index of the token after the latest occurrence
        self._num_prompt = len(prompt)
        self._match = 0  # length of that of the latest draft
        self._other_cost = other_cost
        self._num_tokens = [EXPECTED_TOKENS_PER_CALL * other_cost, *EXPECTED_TOKENS]  # of a cycle, by its match
        self._append(prompt)

    def draft(self, new: Sequence[int], size: int) -> list[int]:
        self._append(new[len(self._tokens) - self._num_prompt :])
        for length in range(min(MAX_MATCH, len(self._tokens)), 0, -1):
            start = self._after.get(tuple(self._tokens[-length:]))
            if start is not None:
                self._match = length
                if self._num_tokens[length] <= self._num_tokens[0] / self._other_cost:
                    return []
                # In a text that goes round in circles, the copy goes on with what it has copied.
                period = len(self._tokens) - start
                return [self._tokens[start + offset % period] for offset in range(size)]
        return []

    def learn(self, num_tokens: int, is_copied: bool) -> None:
        match = self._match if is_copied else 0
        self._num_tokens[match] += LEARNING_RATE * (num_tokens - self._num_tokens[match])

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for length in range(1, min(MAX_MATCH, end) + 1):
                self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)
