"""Goodness-of-fit tests: bounds that samples of the correct distribution exceed once in a million runs."""

from scipy import stats
from torch import Tensor

SIGNIFICANCE = 1e-6


def chi_square_bound(degrees_of_freedom: int) -> float:
    """Bound for `chi_square`."""
    return float(stats.chi2.isf(SIGNIFICANCE, degrees_of_freedom))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The chi-square statistic of counts `[K]` for positive probabilities `[K]`."""
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def kolmogorov_distance(cdf_values: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of n samples, from the values of the correct CDF at the samples."""
    return float(stats.kstest(cdf_values.numpy(), "uniform").statistic)


def kolmogorov_bound(n: int) -> float:
    """Bound for `kolmogorov_distance` of n samples."""
    return float(stats.kstwo.isf(SIGNIFICANCE, n))
