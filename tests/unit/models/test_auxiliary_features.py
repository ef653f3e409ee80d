"""Features of u: formulas in exact arithmetic, one contract for all classes, and the resolution that each states."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ptp_lightning.models
from ptp_lightning.models import (
    ArithmeticFeatures,
    BinaryFeatures,
    CosineFeatures,
    FloatBitFeatures,
    FourierFeatures,
    LinearInterpolationFeatures,
    MultiscaleHatFeatures,
    RawFloatFeatures,
    RoundingFeatures,
    SawtoothFeatures,
    ScaleFreeCosineFeatures,
    ThresholdFeatures,
)
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.testing import check_features

LARGEST = 1 - 2.0**-53  # the largest float64 below 1
JUST_BELOW_HALF = 0.5 - 2.0**-40  # float32 rounds it to 0.5
EDGES = [0.0, 5e-324, 2.0**-53, 2.0**-13, 0.25, JUST_BELOW_HALF, 0.5, 0.5 + 2.0**-40, 0.75, 1 - 2.0**-24, LARGEST]


def vector(features: AuxiliaryFeatures, u: float) -> Tensor:
    return features(torch.tensor(u, dtype=torch.float64))


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- references
# In exact fractions up to the last step, one number a time.


def digits(u: float, bits: int) -> list[int]:
    return [math.floor(Fraction(u) * 2**i) % 2 for i in range(1, bits + 1)]


def float_bits(u: float) -> list[int]:
    """Sign, biased exponent and mantissa of the largest float32 that is at most u, by hand."""
    exact, exponent = Fraction(u), 127
    while exact < 1 and exponent > 1:
        exact, exponent = exact * 2, exponent - 1
    mantissa = math.floor(exact * 2**23)
    number = (exponent << 23) + mantissa - 2**23  # without the leading one; a subnormal borrows it from the exponent
    return [int(digit) for digit in f"{number:032b}"]


def hats(u: float, cells: int) -> list[float]:
    return [float(max(Fraction(0), 1 - abs(Fraction(u) * cells - knot))) for knot in range(cells + 1)]


def signs(bits: list[int]) -> list[int]:
    return [2 * bit - 1 for bit in bits]


def scale_free(u: float, K: int) -> list[float]:
    harmonic = sum(1 / k for k in range(1, K + 1))
    return [math.sqrt(2 * K / (harmonic * k)) * math.cos(math.pi * k * u) for k in range(1, K + 1)]


@dataclass(frozen=True)
class Case:
    """Features, the formula they must follow, and two u less than a resolution but more than half of it apart that
    they do not tell apart (only piecewise constant maps have such u)."""

    features: AuxiliaryFeatures
    reference: Callable[[float], list[float] | list[int]]
    alike: tuple[float, float] | None = None


CASES = [
    Case(RawFloatFeatures(), lambda u: [(u - 0.5) * math.sqrt(12)]),
    Case(BinaryFeatures(32), lambda u: signs(digits(u, 32)), (0.5, 0.5 + 2.0**-32 - 2.0**-53)),
    Case(BinaryFeatures(3), lambda u: signs(digits(u, 3)), (0.125, 0.25 - 2.0**-55)),
    Case(FloatBitFeatures(), lambda u: signs(float_bits(u)), (0.5, 0.5 + 2.0**-24 - 2.0**-53)),
    Case(
        ArithmeticFeatures(32),
        lambda u: [math.sqrt(2) * (1 - digit) for digit in digits(u, 32)],
        (0.5, 0.5 + 2.0**-32 - 2.0**-53),
    ),
    Case(ThresholdFeatures(256), lambda u: signs([u <= i / 256 for i in range(1, 256)]), (0.0, 1 / 256)),
    Case(ThresholdFeatures(7), lambda u: signs([u <= i / 7 for i in range(1, 7)]), (1 / 7 + 2.0**-54, 2 / 7)),
    Case(CosineFeatures(64), lambda u: [math.cos(math.pi * k * u) for k in range(1, 65)]),
    Case(CosineFeatures(1), lambda u: [math.cos(math.pi * u)]),
    Case(ScaleFreeCosineFeatures(256), lambda u: scale_free(u, 256)),
    Case(ScaleFreeCosineFeatures(5), lambda u: scale_free(u, 5)),
    Case(
        FourierFeatures(32),
        lambda u: [math.sqrt(2) * f(math.pi * k * u) for f in (math.sin, math.cos) for k in range(1, 33)],
    ),
    Case(FourierFeatures(1), lambda u: [math.sqrt(2) * f(math.pi * u) for f in (math.sin, math.cos)]),
    Case(SawtoothFeatures(16), lambda u: [float(Fraction(u) * 2**i % 1 - Fraction(1, 2)) * 12**0.5 for i in range(16)]),
    Case(
        RoundingFeatures(256),
        lambda u: [16.0 * (math.floor(Fraction(u) * 256) == cell) for cell in range(256)],
        (0.0, 1 / 256 - 2.0**-61),
    ),
    Case(
        RoundingFeatures(7),
        lambda u: [7**0.5 * (math.floor(u * 7) == cell) for cell in range(7)],
        (0.0, 1 / 7 - 2.0**-55),
    ),
    Case(LinearInterpolationFeatures(64), lambda u: [math.sqrt(1.5 * 65) * hat for hat in hats(u, 64)]),
    Case(LinearInterpolationFeatures(1), lambda u: [math.sqrt(3) * hat for hat in hats(u, 1)]),
    Case(
        MultiscaleHatFeatures(),
        lambda u: [math.sqrt(1.5 * 344 / 4) * hat for n in (4, 16, 64, 256) for hat in hats(u, n)],
    ),
    Case(
        MultiscaleHatFeatures((3, 5)), lambda u: [math.sqrt(1.5 * 10 / 2) * hat for n in (3, 5) for hat in hats(u, n)]
    ),
]
ALL = [case.features for case in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.features))
each = pytest.mark.parametrize("features", ALL, ids=repr)


def test_every_class_is_under_contract() -> None:
    exported = {getattr(ptp_lightning.models, name) for name in ptp_lightning.models.__all__ if "Features" in name}
    exported.remove(AuxiliaryFeatures)
    ours = {kind for kind in concrete(AuxiliaryFeatures) if kind.__module__.startswith("ptp_lightning.")}
    assert exported == {type(features) for features in ALL} == ours


def concrete(kind: type) -> list[type]:
    """Classes at any depth below a kind that are no kinds themselves."""
    below = kind.__subclasses__()
    return [cls for cls in below if not inspect.isabstract(cls)] + [deep for cls in below for deep in concrete(cls)]


# --------------------------------------------------------------------------------------------- contract


@each_case
def test_formula(case: Case) -> None:
    for u in [*EDGES, *uniform(20).tolist()]:
        found = vector(case.features, u)
        expected = torch.tensor([float(value) for value in case.reference(u)], dtype=torch.float64)
        torch.testing.assert_close(
            found.double(), expected, rtol=2.0**-23, atol=1e-11, msg=lambda text, u=u: f"u = {u!r}: {text}"
        )


@each
def test_contract(features: AuxiliaryFeatures) -> None:
    check_features(features)


@pytest.mark.parametrize("cells", [2, 3, 5, 7, 10, 64, 100, 255, 256, 1000, 65537])
def test_largest_u_is_in_the_last_cell(cells: int) -> None:
    assert vector(RoundingFeatures(cells), LARGEST).argmax() == cells - 1
    hats = vector(LinearInterpolationFeatures(cells), LARGEST)
    assert hats.nonzero().flatten().tolist() == [cells - 1, cells]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: BinaryFeatures(0), "bits >= 1, found 0"),
        (lambda: ArithmeticFeatures(0), "bits >= 1, found 0"),
        (lambda: ThresholdFeatures(1), "cells >= 2, found 1"),
        (lambda: CosineFeatures(0), "num_frequencies >= 1, found 0"),
        (lambda: ScaleFreeCosineFeatures(0), "num_frequencies >= 1, found 0"),
        (lambda: FourierFeatures(-1), "num_frequencies >= 1, found -1"),
        (lambda: SawtoothFeatures(0), "num_octaves >= 1, found 0"),
        (lambda: RoundingFeatures(1), "cells >= 2, found 1"),
        (lambda: LinearInterpolationFeatures(0), "cells >= 1, found 0"),
        (lambda: MultiscaleHatFeatures((4, 0)), "cells >= 1, found 0"),
        (lambda: MultiscaleHatFeatures(()), "cells >= 1, found 0"),
    ],
)
def test_empty_maps_are_refused(make: Callable[[], AuxiliaryFeatures], key: str) -> None:
    with pytest.raises(ValueError, match=f"predictor.features.init_args.{key}"):
        make()


# ------------------------------------------------------------------------------------------- resolution


@st.composite
def resolved(draw: st.DrawFn) -> tuple[AuxiliaryFeatures, float, float]:
    """Features and u < v at least a resolution apart, mostly little more, also at the ends and at knots and edges."""
    features = draw(st.sampled_from(ALL))
    edge = (
        st.builds(Fraction, st.integers(0, 256), st.sampled_from([3, 5, 7, 64, 256])).filter(lambda i: i < 1).map(float)
    )
    u = draw(st.sampled_from(EDGES) | st.floats(0, LARGEST) | edge)
    least = Fraction(u) + Fraction(features.resolution)
    v = draw(st.floats(1, 2) | st.just(1.0) | st.floats(0, 60).map(lambda power: 2.0**power))
    v = float(Fraction(u) + Fraction(features.resolution) * Fraction(v))
    v = v if Fraction(v) >= least else math.nextafter(v, math.inf)
    if draw(st.booleans()):  # seen from 1, where float64 is coarser
        mirrored_u, mirrored_v = 1 - v, 1 - u
        u, v = mirrored_u, mirrored_v
    assume(u >= 0 and v < 1 and Fraction(v) - Fraction(u) >= Fraction(features.resolution))
    return features, u, v


@given(resolved())
@settings(deadline=None, max_examples=200)
def test_a_resolution_apart_is_distinguished(example: tuple[AuxiliaryFeatures, float, float]) -> None:
    features, u, v = example
    assert not torch.equal(vector(features, u), vector(features, v))


@pytest.mark.parametrize("case", [case for case in CASES if case.alike], ids=lambda case: repr(case.features))
def test_cells_are_as_wide_as_stated(case: Case) -> None:
    u, v = case.alike
    assert case.features.resolution / 2 < v - u < case.features.resolution
    assert torch.equal(vector(case.features, u), vector(case.features, v))


@pytest.mark.parametrize("features", [CosineFeatures(1), CosineFeatures(64)], ids=repr)
def test_cosines_are_level_at_zero(features: AuxiliaryFeatures) -> None:
    """float32 sees no difference at half the stated resolution: the statement is tight."""
    assert torch.equal(vector(features, 0.0), vector(features, features.resolution / 2))


def test_zero_and_one_half_have_different_digits() -> None:
    """By the paper's `<= 1/2` all of e_i would be one for both."""
    assert (vector(ArithmeticFeatures(4), 0.0) != vector(ArithmeticFeatures(4), 0.5)).tolist() == [True] + [False] * 3


def test_raw_float_is_half_a_resolution_from_coarse() -> None:
    u = uniform(1000) / 4 + 0.75
    assert (RawFloatFeatures()(u) == RawFloatFeatures()(u + 2.0**-25)).any()


# ---------------------------------------------------------------------------------------------- designs


def test_hats_are_zero_but_at_two_knots_of_a_grid() -> None:
    found = MultiscaleHatFeatures((2, 4))(torch.tensor([0.125, 1 / 3], dtype=torch.float64)) / math.sqrt(6)
    torch.testing.assert_close(
        found, torch.tensor([[3 / 4, 1 / 4, 0, 1 / 2, 1 / 2, 0, 0, 0], [1 / 3, 2 / 3, 0, 0, 2 / 3, 1 / 3, 0, 0]])
    )


def test_every_grid_has_the_same_energy() -> None:
    energy = MultiscaleHatFeatures((4, 16, 64))(uniform(20_000)).double().square().mean(0)
    shares = torch.stack([grid.sum() for grid in energy.split([5, 17, 65])]) / energy.sum()
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0.02, atol=0)


def test_every_octave_has_the_same_energy() -> None:
    energy = ScaleFreeCosineFeatures(255)(uniform(20_000)).double().square().mean(0)
    octaves = torch.stack([octave.sum() for octave in energy.split([2**i for i in range(8)])])
    assert (octaves[3:] / octaves[-1]).log().abs().max() < 0.1  # log 2 in the limit, as 1/k + ... + 1/(2k - 1)
