"""Ngrams: what usually follows one or two tokens, counted in training text. Decoding drafts from them at no cost.

Verification knows nothing of them, so texts do not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_CONTEXT = 2
"""Tokens that a continuation depends on, at most. What follows three is known from too few places."""
MAX_NGRAMS = 2**20
"""Of a predictor. Decoding reads them as a map in memory, of 0.5 GB for so many."""
SMALLEST_PROBABILITY = 0.05
"""Of a continuation that is kept: to verify a less likely one takes longer than it saves."""

Continuations = Mapping[tuple[int, ...], Sequence[tuple[int, float]]]
"""From one or two tokens to the tokens that may follow them, and their probabilities."""


class Ngrams(NamedTuple):
    """N continuations.

    Attributes:
        token_ids: `[N, 3]` int32, two tokens and the one that follows them. The first is -1 where a continuation
            depends on one token alone, and all are -1 where there are fewer continuations than N.
        probabilities: `[N]` float16.
    """

    token_ids: Tensor
    probabilities: Tensor

    def continuations(self) -> dict[tuple[int, ...], list[tuple[int, float]]]:
        """See `Continuations`.

        >>> Ngrams(torch.tensor([[-1, 7, 5], [7, 5, 2], [-1, -1, -1]]), torch.tensor([0.5, 0.25, 0.0])).continuations()
        {(7,): [(5, 0.5)], (7, 5): [(2, 0.25)]}
        """
        found: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for (first, second, follower), probability in zip(
            self.token_ids.tolist(), self.probabilities.tolist(), strict=True
        ):
            if follower >= 0:
                context = (second,) if first < 0 else (first, second)
                found.setdefault(context, []).append((follower, probability))
        return found


def count_ngrams(texts: Iterable[Sequence[int]], size: int) -> Ngrams:
    """The continuations of the most frequent contexts, likeliest first.

    Args:
        texts: token ids; what follows the end of a text does not count.
        size: N.

    >>> count_ngrams([[7, 5, 2], [7, 5], [7, 4]], size=3).token_ids.tolist()
    [[-1, 7, 5], [-1, 7, 4], [-1, 5, 2]]
    """
    flat = np.concatenate([np.empty(0, np.int64), *(np.append(np.asarray(text, np.int64), -1) for text in texts)])
    parts = [_counted(flat, length) for length in range(1, MAX_CONTEXT + 1)]
    token_ids, probabilities, totals = (np.concatenate(column) for column in zip(*parts, strict=True))
    # Equally frequent contexts are in the order of their tokens.
    order = np.lexsort((token_ids[:, 2], -probabilities, token_ids[:, 1], token_ids[:, 0], -totals))[:size]
    counted = Ngrams(torch.full((size, 3), -1, dtype=torch.int32), torch.zeros(size, dtype=torch.float16))
    counted.token_ids[: len(order)] = torch.from_numpy(token_ids[order]).int()
    counted.probabilities[: len(order)] = torch.from_numpy(probabilities[order]).half()
    return counted


def require_ngrams(ngrams: Ngrams, num_tokens: int) -> None:
    """Refuse stored continuations that are none of a vocabulary of V = `num_tokens` tokens.

    Raises:
        ValueError: a token id or a probability is out of range.
    """
    ids, probabilities = ngrams
    if not ((ids >= -1) & (ids < num_tokens)).all() or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(
            f"expected n-grams of token ids below {num_tokens} and probabilities, found numbers that are none: they "
            "belong to another base model or are damaged, take another copy of the adapter"
        )


def _counted(flat: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Continuations of `length` tokens.

    Args:
        flat: token ids of all texts, each followed by -1.
        length: 1 or 2.

    Returns:
        Their tokens `[M, 3]`, their probabilities `[M]`, and how often the tokens before them occur `[M]`.
    """
    if len(flat) <= length:
        return np.empty((0, 3), np.int64), np.empty(0), np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(flat, length + 1)
    windows = windows[(windows >= 0).all(axis=1)]
    num_tokens = int(flat.max()) + 1
    before = np.full(len(windows), -1) if length == 1 else windows[:, 0]
    contexts, numbers = np.unique((before + 1) * num_tokens + windows[:, -2], return_inverse=True)
    occurrences = np.bincount(numbers)
    pairs, counts = np.unique(numbers * num_tokens + windows[:, -1], return_counts=True)
    context, follower = np.divmod(pairs, num_tokens)
    probabilities = counts / (occurrences[context] + 1)  # what was seen once follows in half of all cases at most
    first, second = np.divmod(contexts[context], num_tokens)
    kept = probabilities >= SMALLEST_PROBABILITY
    token_ids = np.stack([first - 1, second, follower], axis=1)
    return token_ids[kept], probabilities[kept], occurrences[context][kept]
