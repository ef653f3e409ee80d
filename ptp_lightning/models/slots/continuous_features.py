"""Continuous features of u: u itself, sawtooth waves, sinusoids and hat functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures, require_at_least


@dataclass(frozen=True)
class RawFloatFeatures(AuxiliaryFeatures):
    """u itself, centred and scaled to unit variance. With the mlp head this is the paper's `float + NN`.

    The result is rounded to float32, so the resolution is 2**-24.

    >>> RawFloatFeatures()(torch.tensor([0.0, 0.5]))
    tensor([[-1.7321],
            [ 0.0000]])
    """

    @property
    def num_features(self) -> int:
        """One."""
        return 1

    @property
    def resolution(self) -> float:
        """Half the spacing of float32 numbers in [1, 2), over a slope of sqrt(12), is below this."""
        return 2.0**-24

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """`(u - 1/2) sqrt(12)`."""
        return _unit_variance(auxiliaries.double().unsqueeze(-1))


@dataclass(frozen=True)
class SawtoothFeatures(AuxiliaryFeatures):
    """frac(2**i u), i = 0 .. num_octaves - 1, centred, of unit variance. Resolution 2**-(23 + num_octaves)."""

    num_octaves: int = 16

    def __post_init__(self) -> None:
        """Require at least one octave."""
        require_at_least("num_octaves", self.num_octaves, 1)

    @property
    def num_features(self) -> int:
        """One feature for each octave."""
        return self.num_octaves

    @property
    def resolution(self) -> float:
        """That of `RawFloatFeatures` divided by the steepest slope."""
        return 2.0 ** -(23 + self.num_octaves)

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Sawtooth waves, widest first."""
        slope = 2.0 ** torch.arange(self.num_octaves, dtype=torch.float64, device=auxiliaries.device)
        return _unit_variance((auxiliaries.double().unsqueeze(-1) * slope).frac())


class WaveFeatures(AuxiliaryFeatures):
    """Base class of maps to cosines (or sines) of pi k u, k = 1 .. num_frequencies."""

    num_frequencies: int

    def __post_init__(self) -> None:
        """Require at least one frequency."""
        require_at_least("num_frequencies", self.num_frequencies, 1)

    @property
    def num_features(self) -> int:
        """One feature for each frequency."""
        return self.num_frequencies

    def angles(self, auxiliaries: Tensor) -> Tensor:
        """`pi k u`: `[..., num_frequencies]`, float64."""
        frequency = torch.arange(1, self.num_frequencies + 1, dtype=torch.float64, device=auxiliaries.device)
        return math.pi * auxiliaries.double().unsqueeze(-1) * frequency


@dataclass(frozen=True)
class CosineFeatures(WaveFeatures):
    """cos(pi k u) for k = 1 .. num_frequencies: smooth functions on [0, 1), low frequencies first.

    Likely tokens have wide intervals, so a smooth map generalises well between neighbouring u. All cosines have slope 0
    at u = 0, where float32 separates u and v only if their squares differ.

    >>> CosineFeatures(num_frequencies=3)(torch.tensor([0.0, 0.2]))
    tensor([[ 1.0000,  1.0000,  1.0000],
            [ 0.8090,  0.3090, -0.3090]])
    """

    num_frequencies: int = 64

    @property
    def resolution(self) -> float:
        """2**-13 divided by the number of frequencies (at most 512); attained at 0.

        With `k = ceil(2**-13 / |u - v|)`, feature k differs by `2 sin(pi k |u - v| / 2)**2 > 2**-24` or more where
        `k (u + v) / 2` is within 1/2 of 0 or k, and else feature k or k - 1 by `|u - v| / 2` or more.
        """
        return 2.0**-13 / min(self.num_frequencies, 512)

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Cosines of increasing frequency."""
        return torch.cos(self.angles(auxiliaries)).float()


@dataclass(frozen=True)
class ScaleFreeCosineFeatures(WaveFeatures):
    """cos(pi k u) / sqrt(k), scaled to unit magnitude: every octave of frequencies has the same energy.

    Our own. The spectrum of an interval's indicator function decays as 1 / k**2. Equal weights (`CosineFeatures`)
    overweight high frequencies; weights of 1 / k (similar to `ThresholdFeatures`) underweight narrow intervals.
    """

    num_frequencies: int = 256

    @property
    def resolution(self) -> float:
        """Twice that of `CosineFeatures`, because scaled values have up to twice the rounding error."""
        return 2.0**-12 / min(self.num_frequencies, 512)

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Cosines of increasing frequency and decreasing magnitude."""
        energy = 1 / torch.arange(1, self.num_frequencies + 1, dtype=torch.float64, device=auxiliaries.device)
        amplitude = torch.sqrt(2 * energy / energy.mean())
        return (amplitude * torch.cos(self.angles(auxiliaries))).float()


@dataclass(frozen=True)
class FourierFeatures(WaveFeatures):
    """sin(pi k u) and cos(pi k u), k = 1 .. num_frequencies, times sqrt(2). Resolution 2**-24 / num_frequencies.

    The period is 2, so that u near 0 and u near 1 have different features. With sines the map has no stationary point.
    """

    num_frequencies: int = 32

    @property
    def num_features(self) -> int:
        """A sine and a cosine for each frequency."""
        return 2 * self.num_frequencies

    @property
    def resolution(self) -> float:
        """The highest frequency's sine or cosine moves by more than float32's spacing in [1, 2)."""
        return 2.0**-24 / self.num_frequencies

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """All sines, then all cosines, of increasing frequency."""
        angles = self.angles(auxiliaries)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1).mul(math.sqrt(2)).float()


@dataclass(frozen=True)
class LinearInterpolationFeatures(AuxiliaryFeatures):
    """Hat functions on n cells: with a linear head, a trained table at n + 1 knots that is linearly interpolated.

    Resolution 2**-23 / n.

    Args:
        cells: n, intervals between knots; the first knot is at 0, the last at 1.

    >>> LinearInterpolationFeatures(cells=2)(torch.tensor([0.0, 0.25])) / math.sqrt(4.5)
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.0000]])
    """

    cells: int = 64

    def __post_init__(self) -> None:
        """Require at least one cell."""
        require_at_least("cells", self.cells, 1)

    @property
    def num_features(self) -> int:
        """One feature for each knot."""
        return self.cells + 1

    @property
    def resolution(self) -> float:
        """The smaller of the two active hats changes by more than float32's spacing there."""
        return 2.0**-23 / self.cells

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Hats, leftmost first."""
        return _hats(auxiliaries, self.cells, _hat_height(self.num_features, grids=1))


@dataclass(frozen=True)
class MultiscaleHatFeatures(AuxiliaryFeatures):
    """Hat functions on several grids with equal energy. Resolution 2**-23 / finest grid.

    Our own, after multi-resolution grid encodings. Coarse grids represent wide intervals with few knots, fine grids
    represent narrow ones. The map is continuous, so neighbouring u have similar features at initialisation. The hats of
    a grid sum to one, so grids of equal height are trained equally fast by Adam, whose step size does not depend on how
    rarely a fine knot is active.

    Args:
        cells: intervals of each grid.
    """

    cells: tuple[int, ...] = (4, 16, 64, 256)

    def __post_init__(self) -> None:
        """Require at least one grid, and one cell in each."""
        require_at_least("cells", min(self.cells, default=0), 1)

    @property
    def num_features(self) -> int:
        """One feature for each knot of each grid."""
        return sum(cells + 1 for cells in self.cells)

    @property
    def resolution(self) -> float:
        """That of the finest grid."""
        return 2.0**-23 / max(self.cells)

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Grid after grid, leftmost hats first."""
        height = _hat_height(self.num_features, grids=len(self.cells))
        return torch.cat([_hats(auxiliaries, cells, height) for cells in self.cells], dim=-1)


def _unit_variance(uniform: Tensor) -> Tensor:
    """Centre and scale float64 numbers that are uniform in [0, 1)."""
    return ((uniform - 0.5) * math.sqrt(12)).float()


def _hat_height(num_features: int, grids: int) -> float:
    """Height for features of unit magnitude: the squares of a grid's hats sum to 2/3 on average."""
    return math.sqrt(1.5 * num_features / grids)


def _hats(auxiliaries: Tensor, cells: int, height: float) -> Tensor:
    """Hats at the knots i / cells: `[..., cells + 1]`, float32. Only the two hats that are not zero are computed.

    No u below 1 is rounded up to the last knot: cells (1 - 2**-53) rounds to the float64 below `cells`.
    """
    position = auxiliaries.double().unsqueeze(-1) * cells
    left = position.floor()
    weight = position - left
    hats = torch.zeros(*auxiliaries.shape, cells + 1, device=auxiliaries.device)
    hats.scatter_(-1, left.long(), ((1 - weight) * height).float())
    return hats.scatter_(-1, left.long() + 1, (weight * height).float())
