"""N-grams: how they are counted, and what is refused."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp_lightning.ngrams import MAX_CONTEXT, SMALLEST_PROBABILITY, Ngrams, count_ngrams, require_ngrams

TEXTS = st.lists(st.lists(st.integers(0, 5), max_size=15), max_size=8)


def in_plain_python(texts: list[list[int]]) -> dict[tuple[int, ...], dict[int, float]]:
    counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for length in range(1, MAX_CONTEXT + 1):
            for k in range(len(text) - length):
                counts[tuple(text[k : k + length])][text[k + length]] += 1
    rates = {context: {t: n / (after.total() + 1) for t, n in after.items()} for context, after in counts.items()}
    return {
        context: kept
        for context, after in rates.items()
        if (kept := {token: rate for token, rate in after.items() if rate >= SMALLEST_PROBABILITY})
    }


@given(texts=TEXTS)
def test_counts_are_those_of_plain_python(texts: list[list[int]]) -> None:
    found = count_ngrams(texts, size=400).continuations()
    expected = in_plain_python(texts)
    assert found.keys() == expected.keys()
    for context, after in found.items():
        assert dict(after) == pytest.approx(expected[context], rel=1e-3)  # float16
        assert [rate for _, rate in after] == sorted((rate for _, rate in after), reverse=True)


@given(texts=TEXTS, size=st.integers(1, 30))
def test_the_most_frequent_contexts_are_kept(texts: list[list[int]], size: int) -> None:
    whole, part = count_ngrams(texts, 400), count_ngrams(texts, size)
    assert part.token_ids.shape == (size, 3) and part.probabilities.shape == (size,)
    assert torch.equal(part.token_ids, whole.token_ids[:size])
    assert torch.equal(part.probabilities, whole.probabilities[:size])
    occurrences = Counter(
        tuple(text[k : k + length]) for text in texts for length in (1, 2) for k in range(len(text) - length)
    )
    contexts = [tuple(token for token in row[:2] if token >= 0) for row in whole.token_ids.tolist() if row[2] >= 0]
    frequencies = [occurrences[context] for context in contexts]
    assert frequencies == sorted(frequencies, reverse=True)


def test_texts_do_not_continue_each_other() -> None:
    assert count_ngrams([[1, 2], [3]], 5).continuations() == {(1,): [(2, 0.5)]}
    assert count_ngrams([], 2).continuations() == {}


def test_large_token_ids() -> None:
    """Two of them are more than 32 bits."""
    most = 2**18 - 1
    assert count_ngrams([[most, most, most]], 5).continuations() == {
        (most,): [(most, pytest.approx(2 / 3, rel=1e-3))],
        (most, most): [(most, 0.5)],
    }


@pytest.mark.parametrize(
    ("row", "probability"),
    [([0, 1, 9], 0.5), ([0, -2, 1], 0.5), ([0, 1, 2], 1.5), ([0, 1, 2], -0.5), ([0, 1, 2], float("nan"))],
)
def test_numbers_that_are_none_are_refused(row: list[int], probability: float) -> None:
    require_ngrams(Ngrams(torch.tensor([[-1, 1, 8]]), torch.tensor([1.0])), num_tokens=9)
    with pytest.raises(ValueError, match="expected n-grams of token ids below 9 and probabilities"):
        require_ngrams(Ngrams(torch.tensor([row]), torch.tensor([probability])), num_tokens=9)
