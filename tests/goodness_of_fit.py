"""How far chance may go: bounds that a true distribution exceeds once in a million draws."""

import math

import torch
from torch import Tensor


def chi_square_bound(degrees_of_freedom: int) -> float:
    """For `sum (counts - expected)^2 / expected` (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees_of_freedom)
    return degrees_of_freedom * (1 - spread + 4.753 * math.sqrt(spread)) ** 3


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The statistic of counts `[K]` under probabilities `[K]`, all of them positive."""
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def kolmogorov_distance(cdf_values: Tensor) -> float:
    """The largest gap between the empirical distribution and the true one.

    Args:
        cdf_values: `[n]`, the true cumulative distribution at each draw.
    """
    ordered = cdf_values.sort().values
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((ordered - steps[:-1]).abs(), (ordered - steps[1:]).abs()).max())


def kolmogorov_bound(n: int) -> float:
    """For `kolmogorov_distance` of n draws (the inequality of Dvoretzky, Kiefer, Wolfowitz and Massart)."""
    return math.sqrt(math.log(2e6) / (2 * n))
