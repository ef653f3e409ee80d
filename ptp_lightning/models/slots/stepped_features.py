"""Piecewise constant features of u: binary digits and cells."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures, require_at_least

CELL_ROUNDING = 2.0**-52  # the ends of a cell are float64 numbers near i / n


class DigitFeatures(AuxiliaryFeatures):
    """Base class of maps to the first binary digits of u. Resolution 2**-bits."""

    bits: int

    def __post_init__(self) -> None:
        """Require at least one digit."""
        require_at_least("bits", self.bits, 1)

    @property
    def num_features(self) -> int:
        """One feature for each digit."""
        return self.bits

    @property
    def resolution(self) -> float:
        """Width of an interval with equal digits."""
        return 2.0**-self.bits


@dataclass(frozen=True)
class BinaryFeatures(DigitFeatures):
    """The first `bits` binary digits of u as -1 and 1 (Draxler et al., ICLR 2026). Resolution 2**-bits.

    Fixed-point digits; the paper's second version uses those of the floating-point number, see `FloatBitFeatures`.

    >>> BinaryFeatures(bits=3)(torch.tensor([0.625]))  # 0.101 in binary
    tensor([[ 1., -1.,  1.]])
    """

    bits: int = 32

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Digits, most significant first."""
        return _digits(auxiliaries, self.bits).mul(2).sub(1).float()


@dataclass(frozen=True)
class ArithmeticFeatures(DigitFeatures):
    """e_i = 1{frac(2**(i - 1) u) < 1/2}, i = 1 .. bits: the paper's `arithmetic`. Resolution 2**-bits.

    The inverted digits of `BinaryFeatures` as 0 and sqrt(2), not centred. The paper writes <= 1/2, so that 0 and 1/2
    have the same code; such points have probability zero.
    """

    bits: int = 32

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Inverted digits, most significant first."""
        return (1 - _digits(auxiliaries, self.bits)).mul(math.sqrt(2)).float()


@dataclass(frozen=True)
class FloatBitFeatures(AuxiliaryFeatures):
    """The 32 bits of u as an IEEE float32 as -1 and 1: the `binary` of the paper's second version. Resolution 2**-24.

    u is rounded towards zero, so that 1 is never reached. Each code represents an interval as wide as the spacing of
    float32 numbers there: 2**-24 in the upper half, and less near 0. The sign and the top bit of the exponent are
    always 0 for u below 1.
    """

    @property
    def num_features(self) -> int:
        """Sign, 8 bits of the exponent, 23 of the mantissa."""
        return 32

    @property
    def resolution(self) -> float:
        """Spacing of float32 numbers in [1/2, 1)."""
        return 2.0**-24

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Bits, most significant first."""
        exact = auxiliaries.double()
        nearest = exact.float()
        below = torch.where(nearest.double() > exact, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
        shifts = torch.arange(31, -1, -1, dtype=torch.int32, device=exact.device)
        bits = below.view(torch.int32).unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1)
        return bits.float().mul(2).sub(1)


class CellFeatures(AuxiliaryFeatures):
    """Base class of maps that are constant on n equal cells. Resolution 1/n."""

    cells: int

    def __post_init__(self) -> None:
        """Require at least two cells."""
        require_at_least("cells", self.cells, 2)

    @property
    def resolution(self) -> float:
        """Width of a cell."""
        return 1 / self.cells + CELL_ROUNDING


@dataclass(frozen=True)
class ThresholdFeatures(CellFeatures):
    """e_i = 1{u <= i/n} as -1 and 1, i = 1 .. n - 1: the paper's `threshold`. Resolution 1/n.

    The threshold at 1 is left out, because every u is below it.

    Args:
        cells: n, the number of intervals between thresholds.

    >>> ThresholdFeatures(cells=4)(torch.tensor([0.3]))  # thresholds 1/4, 1/2 and 3/4
    tensor([[-1.,  1.,  1.]])
    """

    cells: int = 256

    @property
    def num_features(self) -> int:
        """One feature for each threshold."""
        return self.cells - 1

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Thresholds, lowest first."""
        thresholds = torch.arange(1, self.cells, dtype=torch.float64, device=auxiliaries.device) / self.cells
        return (auxiliaries.double().unsqueeze(-1) <= thresholds).float().mul(2).sub(1)


@dataclass(frozen=True)
class RoundingFeatures(CellFeatures):
    """The cell of u among n equal cells, one-hot: with a linear head, a trained table of n vectors. Resolution 1/n.

    u is rounded down, so that all cells are equally wide. The active feature is sqrt(n).

    Args:
        cells: n, length of the table.

    >>> RoundingFeatures(cells=4)(torch.tensor([0.3]))
    tensor([[0., 2., 0., 0.]])
    """

    cells: int = 256

    @property
    def num_features(self) -> int:
        """One feature for each cell."""
        return self.cells

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """One-hot cells."""
        cell = (auxiliaries.double().unsqueeze(-1) * self.cells).long()
        table = torch.zeros(*auxiliaries.shape, self.cells, device=auxiliaries.device)
        return table.scatter_(-1, cell, math.sqrt(self.cells))


def _digits(auxiliaries: Tensor, bits: int) -> Tensor:
    """First binary digits of u: `[..., bits]`, float64, exact."""
    power = 2.0 ** torch.arange(1, bits + 1, dtype=torch.float64, device=auxiliaries.device)
    return (auxiliaries.double().unsqueeze(-1) * power).floor().remainder(2)
