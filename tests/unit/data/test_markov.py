"""MarkovSeries: the given entropy, conditionals against brute force over all strings, and sample statistics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.data.series.markov import MarkovSeries

CHAINS = [MarkovSeries(1, 5, 1.0), MarkovSeries(2, 3, 0.7, seed=1), MarkovSeries(3, 2, 0.4, seed=2)]
by_chain = pytest.mark.parametrize("series", CHAINS, ids=lambda series: f"order {series.order}")


def string_probabilities(series: MarkovSeries, length: int) -> dict[tuple[int, ...], float]:
    """Probabilities of all strings of `length` >= order tokens of the stationary chain, by the chain rule."""
    V, order = series.vocab_size, series.order
    transitions, stationary = series.transitions.tolist(), series.stationary.tolist()

    def state(tokens: tuple[int, ...]) -> int:
        return int("".join(map(str, tokens)), V)

    probabilities: dict[tuple[int, ...], float] = {}
    for string in itertools.product(range(V), repeat=length):
        probability = stationary[state(string[:order])]
        for position in range(order, length):
            probability *= transitions[state(string[position - order : position])][string[position]]
        probabilities[string] = probability
    return probabilities


def marginal(probabilities: dict[tuple[int, ...], float], *positions: int) -> dict[tuple[int, ...], float]:
    """Marginal distribution of the tokens at some positions of the strings."""
    sums: dict[tuple[int, ...], float] = {}
    for string, probability in probabilities.items():
        key = tuple(string[position] for position in positions)
        sums[key] = sums.get(key, 0.0) + probability
    return sums


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 1.0])
def test_entropy_is_the_chosen_one(order: int, fraction: float) -> None:
    chosen = fraction * math.log(4)
    series = MarkovSeries(order, 4, chosen)
    probabilities = string_probabilities(series, order + 1)
    contexts = marginal(probabilities, *range(order))
    found = -sum(p * math.log(p / contexts[string[:-1]]) for string, p in probabilities.items() if p > 0)
    assert found == pytest.approx(chosen, abs=1e-9)


@by_chain
def test_stationary(series: MarkovSeries) -> None:
    probabilities = string_probabilities(series, series.order + 1)
    before, after = (marginal(probabilities, *range(j, j + series.order)) for j in (0, 1))
    assert before == pytest.approx(after, abs=1e-10)
    assert sum(before.values()) == pytest.approx(1)


@by_chain
def test_conditionals_of_every_history_known_or_not(series: MarkovSeries) -> None:
    V, order = series.vocab_size, series.order
    probabilities = string_probabilities(series, order + 1)
    for num_known in range(order + 1):
        joint = marginal(probabilities, *range(order - num_known, order + 1))
        seen = marginal(probabilities, *range(order - num_known, order))
        for known in itertools.product(range(V), repeat=num_known):
            found = series.conditionals(torch.tensor([V] * (order - num_known) + list(known)))
            expected = [joint[(*known, token)] / seen[known] for token in range(V)]
            assert found.dtype == torch.float64
            assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_conditionals_of_many_histories_at_once() -> None:
    series = CHAINS[1]
    histories = torch.randint(series.vocab_size, (4, 3, 2), generator=torch.Generator().manual_seed(0))
    found = series.conditionals(histories)
    assert found.shape == (4, 3, 3)
    for row, window in itertools.product(range(4), range(3)):
        assert torch.equal(found[row, window], series.conditionals(histories[row, window]))


@by_chain
def test_rows_follow_the_chain(series: MarkovSeries) -> None:
    length, count = series.order + 2, 40_000
    rows = series.draw_rows(count, length, torch.Generator().manual_seed(0))
    expected = string_probabilities(series, length)
    # Pearson's statistic over all strings that are likely enough: mean d, variance 2 d
    numbers: Tensor = (rows * series.vocab_size ** torch.arange(length).flip(0)).sum(-1)
    counts = torch.bincount(numbers, minlength=series.vocab_size**length).tolist()
    terms = [
        (found - count * p) ** 2 / (count * p) for found, p in zip(counts, expected.values(), strict=True) if p > 1e-3
    ]
    assert sum(terms) < len(terms) + 5 * math.sqrt(2 * len(terms))


@by_chain
def test_marginal_divergence_by_brute_force(series: MarkovSeries) -> None:
    """Entry k: the mutual information of token k and the tokens before it in the window, given the context."""
    order, length = series.order, 3
    for k in range(length):
        probabilities = string_probabilities(series, order + k + 1)
        context = tuple(range(order))
        contexts, without_token = marginal(probabilities, *context), marginal(probabilities, *range(order + k))
        with_token = marginal(probabilities, *context, order + k)
        expected = sum(
            p
            * math.log(
                p * contexts[string[:order]] / without_token[string[:-1]] / with_token[(*string[:order], string[-1])]
            )
            for string, p in probabilities.items()
        )
        assert float(series.marginal_divergence(length)[k]) == pytest.approx(expected, abs=1e-8)


def test_rows_are_reproducible() -> None:
    series, again, other = MarkovSeries(seed=1), MarkovSeries(seed=1), MarkovSeries(seed=2)
    assert torch.equal(series.fixed_rows("val", 20, 5), again.fixed_rows("val", 20, 5))
    assert not torch.equal(series.fixed_rows("val", 20, 5), series.fixed_rows("test", 20, 5))
    assert not torch.equal(series.transitions, other.transitions)
    rows, same = (
        chain.row_sampler("train", 6)(4, torch.Generator().manual_seed(3)) for chain in (series, MarkovSeries(seed=1))
    )
    assert torch.equal(rows, same)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"order": 0}, "order"),
        ({"order": 4}, "order"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"order": 3, "vocab_size": 100}, "order"),
        ({"entropy": 0.0}, "entropy"),
        ({"entropy": 1.7}, "entropy"),
    ],
)
def test_invalid_settings(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"data.series.{key}"):
        MarkovSeries(**settings)
