"""Maps of u that vary within every interval: u itself, saw teeth, waves and hats."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures, require_at_least


@dataclass(frozen=True)
class RawFloatFeatures(AuxiliaryFeatures):
    """u itself, centred and scaled to unit variance. With the mlp head the paper's `float + NN`.

    float32 rounds the result, so the resolution is 2**-24.
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
        """Refuse no octave."""
        require_at_least("num_octaves", self.num_octaves, 1)

    @property
    def num_features(self) -> int:
        """One feature an octave."""
        return self.num_octaves

    @property
    def resolution(self) -> float:
        """That of `RawFloatFeatures`, over the steepest slope."""
        return 2.0 ** -(23 + self.num_octaves)

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Saw teeth, widest first."""
        slope = 2.0 ** torch.arange(self.num_octaves, dtype=torch.float64, device=auxiliaries.device)
        return _unit_variance((auxiliaries.double().unsqueeze(-1) * slope).frac())


class WaveFeatures(AuxiliaryFeatures):
    """Maps of cosines (or sines) of pi k u, k = 1 .. num_frequencies: what they share."""

    num_frequencies: int

    def __post_init__(self) -> None:
        """Refuse no frequency."""
        require_at_least("num_frequencies", self.num_frequencies, 1)

    @property
    def num_features(self) -> int:
        """One feature a frequency."""
        return self.num_frequencies

    def angles(self, auxiliaries: Tensor) -> Tensor:
        """`pi k u`: `[..., num_frequencies]`, float64."""
        frequency = torch.arange(1, self.num_frequencies + 1, dtype=torch.float64, device=auxiliaries.device)
        return math.pi * auxiliaries.double().unsqueeze(-1) * frequency


@dataclass(frozen=True)
class CosineFeatures(WaveFeatures):
    """cos(pi k u) for k = 1 .. num_frequencies: the smooth functions on [0, 1), coarse first.

    The intervals to be told apart are wide for likely tokens, so a smooth map generalises between neighbouring u.
    All cosines are level at 0, where float32 tells u from v only if their squares differ.
    """

    num_frequencies: int = 64

    @property
    def resolution(self) -> float:
        """2**-13 over the number of frequencies, of which 512 are counted; attained at 0.

        With k = ceil(2**-13 / |u - v|), feature k differs by 2 sin(pi k |u - v| / 2)**2 > 2**-24 or more where
        k (u + v) / 2 is within 1/2 of 0 or k, and else feature k or k - 1 by |u - v| / 2 or more.
        """
        return 2.0**-13 / min(self.num_frequencies, 512)

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Cosines of rising frequency."""
        return torch.cos(self.angles(auxiliaries)).float()


@dataclass(frozen=True)
class ScaleFreeCosineFeatures(WaveFeatures):
    """cos(pi k u) / sqrt(k), scaled to unit magnitude: every octave of frequencies has the same energy.

    Our own. An interval's indicator has a spectrum that falls as 1 / k**2; equal weights (`CosineFeatures`) spend as
    much on what is hardly there, a weight of 1 / k (about `ThresholdFeatures`) starves narrow intervals.
    """

    num_frequencies: int = 256

    @property
    def resolution(self) -> float:
        """Twice that of `CosineFeatures`: scaled values lie anywhere between powers of two."""
        return 2.0**-12 / min(self.num_frequencies, 512)

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Cosines of rising frequency and falling magnitude."""
        energy = 1 / torch.arange(1, self.num_frequencies + 1, dtype=torch.float64, device=auxiliaries.device)
        amplitude = torch.sqrt(2 * energy / energy.mean())
        return (amplitude * torch.cos(self.angles(auxiliaries))).float()


@dataclass(frozen=True)
class FourierFeatures(WaveFeatures):
    """sin(pi k u) and cos(pi k u), k = 1 .. num_frequencies, times sqrt(2). Resolution 2**-24 / num_frequencies.

    The period is 2, so that u near 0 and u near 1 are told apart. With the sines, no place is level.
    """

    num_frequencies: int = 32

    @property
    def num_features(self) -> int:
        """A sine and a cosine each."""
        return 2 * self.num_frequencies

    @property
    def resolution(self) -> float:
        """The highest frequency's sine or cosine moves by more than float32's spacing in [1, 2)."""
        return 2.0**-24 / self.num_frequencies

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """All sines, then all cosines, of rising frequency."""
        angles = self.angles(auxiliaries)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1).mul(math.sqrt(2)).float()


@dataclass(frozen=True)
class LinearInterpolationFeatures(AuxiliaryFeatures):
    """Hat functions on n cells: a linear head is a trained table at n + 1 knots, linearly interpolated.

    Resolution 2**-23 / n.

    Args:
        cells: n, intervals between knots; the first knot is at 0, the last at 1.
    """

    cells: int = 64

    def __post_init__(self) -> None:
        """Refuse no cell."""
        require_at_least("cells", self.cells, 1)

    @property
    def num_features(self) -> int:
        """One feature a knot."""
        return self.cells + 1

    @property
    def resolution(self) -> float:
        """The smaller of the two hats over u moves by more than float32's spacing there."""
        return 2.0**-23 / self.cells

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Hats, leftmost first."""
        return _hats(auxiliaries, self.cells, _hat_height(self.num_features, grids=1))


@dataclass(frozen=True)
class MultiscaleHatFeatures(AuxiliaryFeatures):
    """Hat functions on several grids at once, each with the same share of the energy. Resolution 2**-23 / finest.

    Our own, after multi-resolution grid encodings. Wide intervals are learned from few knots of a coarse grid and hold
    for all u in them, narrow ones from a fine grid; the map is continuous, so neighbouring u start out alike. Since
    hats of a grid sum to one, grids of equal height also move equally fast under Adam, whose steps ignore how rarely
    a fine knot is used.

    Args:
        cells: intervals of each grid.
    """

    cells: tuple[int, ...] = (4, 16, 64, 256)

    def __post_init__(self) -> None:
        """Refuse no grid or no cell."""
        require_at_least("cells", min(self.cells, default=0), 1)

    @property
    def num_features(self) -> int:
        """One feature a knot of each grid."""
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
    """Height that gives all features unit magnitude: the squares of a grid's hats sum to 2/3 on average."""
    return math.sqrt(1.5 * num_features / grids)


def _hats(auxiliaries: Tensor, cells: int, height: float) -> Tensor:
    """Hats at the knots i / cells: `[..., cells + 1]`, float32. Two are not zero, so two are computed.

    No u below 1 is rounded up to the last knot: cells (1 - 2**-53) is nearer to the float64 below `cells`.
    """
    position = auxiliaries.double().unsqueeze(-1) * cells
    left = position.floor()
    share = position - left
    hats = torch.zeros(*auxiliaries.shape, cells + 1, device=auxiliaries.device)
    hats.scatter_(-1, left.long(), ((1 - share) * height).float())
    return hats.scatter_(-1, left.long() + 1, (share * height).float())
