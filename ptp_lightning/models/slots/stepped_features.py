"""Maps of u that are constant on intervals: digits and cells."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures, require_at_least

CELL_ROUNDING = 2.0**-52  # the ends of a cell are float64 numbers near i / n


class DigitFeatures(AuxiliaryFeatures):
    """Maps of the first binary digits of u: what they share. Resolution 2**-bits."""

    bits: int

    def __post_init__(self) -> None:
        """Refuse no digits."""
        require_at_least("bits", self.bits, 1)

    @property
    def num_features(self) -> int:
        """One feature a digit."""
        return self.bits

    @property
    def resolution(self) -> float:
        """Width of the interval in which all digits agree."""
        return 2.0**-self.bits


@dataclass(frozen=True)
class BinaryFeatures(DigitFeatures):
    """The first `bits` binary digits of u as -1 and 1 (Draxler et al., ICLR 2026). Resolution 2**-bits.

    Fixed-point digits; the paper's second version takes those of the floating-point number, see `FloatBitFeatures`.
    """

    bits: int = 32

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Digits, most significant first."""
        return _digits(auxiliaries, self.bits).mul(2).sub(1).float()


@dataclass(frozen=True)
class ArithmeticFeatures(DigitFeatures):
    """e_i = 1{frac(2**(i - 1) u) < 1/2}, i = 1 .. bits: the paper's `arithmetic`. Resolution 2**-bits.

    These are the digits of `BinaryFeatures`, inverted and as 0 and sqrt(2), not centred. The paper writes <= 1/2, by
    which 0 and 1/2 would have the same code; u hits such points with probability zero.
    """

    bits: int = 32

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Inverted digits, most significant first."""
        return (1 - _digits(auxiliaries, self.bits)).mul(math.sqrt(2)).float()


@dataclass(frozen=True)
class FloatBitFeatures(AuxiliaryFeatures):
    """The 32 bits of u as an IEEE float32 as -1 and 1: the `binary` of the paper's second version. Resolution 2**-24.

    u is rounded towards zero, so 1 is never reached and each code stands for an interval as wide as the spacing of
    float32 numbers there: finest next to 0, 2**-24 in the upper half. The sign and the top bit of the exponent are
    always off below 1.
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
    """Maps that are constant on n equal cells: what they share. Resolution 1/n."""

    cells: int

    def __post_init__(self) -> None:
        """Refuse a single cell."""
        require_at_least("cells", self.cells, 2)

    @property
    def resolution(self) -> float:
        """Width of a cell."""
        return 1 / self.cells + CELL_ROUNDING


@dataclass(frozen=True)
class ThresholdFeatures(CellFeatures):
    """e_i = 1{u <= i/n} as -1 and 1, i = 1 .. n - 1: the paper's `threshold`. Resolution 1/n.

    The threshold at 1, which every u is below, is left out.

    Args:
        cells: n, intervals that the thresholds part [0, 1) into.
    """

    cells: int = 256

    @property
    def num_features(self) -> int:
        """One feature a threshold."""
        return self.cells - 1

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Thresholds, lowest first."""
        thresholds = torch.arange(1, self.cells, dtype=torch.float64, device=auxiliaries.device) / self.cells
        return (auxiliaries.double().unsqueeze(-1) <= thresholds).float().mul(2).sub(1)


@dataclass(frozen=True)
class RoundingFeatures(CellFeatures):
    """Which of n equal cells u is in: a linear head is a trained table of n vectors. Resolution 1/n.

    Rounded down, so that all cells are equally wide. The one feature that is not zero is sqrt(n).

    Args:
        cells: n, length of the table.
    """

    cells: int = 256

    @property
    def num_features(self) -> int:
        """One feature a cell."""
        return self.cells

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """One-hot cells."""
        cell = (auxiliaries.double().unsqueeze(-1) * self.cells).long()
        table = torch.zeros(*auxiliaries.shape, self.cells, device=auxiliaries.device)
        return table.scatter_(-1, cell, math.sqrt(self.cells))


def _digits(auxiliaries: Tensor, bits: int) -> Tensor:
    """First binary digits of u: `[..., bits]`, float64, exact."""
    place = 2.0 ** torch.arange(1, bits + 1, dtype=torch.float64, device=auxiliaries.device)
    return (auxiliaries.double().unsqueeze(-1) * place).floor().remainder(2)
