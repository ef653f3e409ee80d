"""How far chance may go: bounds that a true distribution exceeds once in a million draws."""

from scipy import stats
from torch import Tensor

CHANCE = 1e-6


def chi_square_bound(degrees_of_freedom: int) -> float:
    """For `chi_square`."""
    return float(stats.chi2.isf(CHANCE, degrees_of_freedom))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The statistic of counts `[K]` under probabilities `[K]`, all of them positive."""
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def kolmogorov_distance(cdf_values: Tensor) -> float:
    """The largest gap between the empirical distribution and the true one, whose values at the n draws are given."""
    return float(stats.kstest(cdf_values.numpy(), "uniform").statistic)


def kolmogorov_bound(n: int) -> float:
    """For `kolmogorov_distance` of n draws."""
    return float(stats.kstwo.isf(CHANCE, n))
