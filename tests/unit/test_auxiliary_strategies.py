"""Strategies: inside the interval always, with the density they promise, and the same on every run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptp_lightning.auxiliary_strategies import (
    AuxiliaryStrategy,
    BetaInInterval,
    ErrorSeekingInInterval,
    ProbeResult,
    StudentProbe,
    UniformInInterval,
)
from ptp_lightning.testing import check_auxiliary_strategy
from tests.helpers.goodness_of_fit import chi_square, chi_square_bound, kolmogorov_bound, kolmogorov_distance

LARGEST_FLOAT64 = 1 - 2.0**-53
STRATEGIES: list[AuxiliaryStrategy] = [
    UniformInInterval(),
    BetaInInterval(0.01),
    BetaInInterval(0.5),
    BetaInInterval(2.0),
    ErrorSeekingInInterval(0.5),
    ErrorSeekingInInterval(0.999),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full(value: float, size: int = 64) -> Tensor:
    return torch.full((size,), value, dtype=torch.float64)


def picks_from(lower: float, upper: float) -> StudentProbe:
    """A student whose own interval of every given token is `[lower, upper)`."""
    return lambda u: ProbeResult((lower <= u) & (u < upper), (torch.full_like(u, lower), torch.full_like(u, upper)))


def correct_below(edge: float) -> StudentProbe:
    """A one-hot student that drafts the given tokens for u below the edge."""
    return lambda u: ProbeResult(u < edge, None)


def must_not_be_asked(u: Tensor) -> ProbeResult:
    raise AssertionError("a forward pass for nothing")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
class TestEveryStrategy:
    @given(
        lower=st.floats(0, LARGEST_FLOAT64),
        width=st.floats(0, 1),
        own=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
        one_hot=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    @settings(deadline=None, max_examples=60)
    def test_inside_the_narrowest_interval(
        self, strategy: AuxiliaryStrategy, lower: float, width: float, own: list[float], one_hot: bool, seed: int
    ) -> None:
        probe = correct_below(own[0]) if one_hot else picks_from(*own)
        for upper in (math.nextafter(lower, 2), min(lower + width, 1.0)):
            if upper > lower:
                low, high = full(lower), full(upper)
                u = strategy.draw(low, high, generator(seed), probe)
                assert u.dtype == torch.float64
                assert ((low <= u) & (u < high)).all()

    def test_contract(self, strategy: AuxiliaryStrategy) -> None:
        check_auxiliary_strategy(strategy)


def test_uniform_fills_the_interval():
    u = UniformInInterval()(full(0.25, 20_000), full(0.75, 20_000), generator())
    assert kolmogorov_distance((u - 0.25) * 2) < kolmogorov_bound(20_000)


BETA_CDF: dict[float, Callable[[Tensor], Tensor]] = {
    0.5: lambda r: r.sqrt().asin() * 2 / math.pi,
    1.0: lambda r: r,
    2.0: lambda r: r**2 * (3 - 2 * r),
    3.0: lambda r: r**3 * (10 - 15 * r + 6 * r**2),
}
"""Cumulative distributions of Beta(b, b) in closed form."""


class TestBeta:
    def draws(self, b: float, size: int) -> Tensor:
        """Relative positions in an interval of another position and width."""
        return (BetaInInterval(b)(full(0.2, size), full(0.6, size), generator()) - 0.2) / 0.4

    @pytest.mark.parametrize("b", BETA_CDF)
    def test_follows_the_distribution(self, b: float) -> None:
        assert kolmogorov_distance(BETA_CDF[b](self.draws(b, 50_000))) < kolmogorov_bound(50_000)

    def test_the_test_tells_neighbours_apart(self) -> None:
        for b, other in ((0.5, 1.0), (1.0, 2.0), (2.0, 3.0)):
            assert kolmogorov_distance(BETA_CDF[other](self.draws(b, 50_000))) > kolmogorov_bound(50_000)

    def test_variance_at_the_smallest_b(self) -> None:
        """Nearly all mass lies at the two ends; the variance of Beta(b, b) is 1 / (4 (2 b + 1))."""
        squares = (self.draws(0.01, 100_000) - 0.5).square()
        expected = 1 / (4 * (2 * 0.01 + 1))
        assert abs(float(squares.mean()) - expected) < 5 * float(squares.std()) / math.sqrt(100_000)

    @pytest.mark.parametrize("b", [0.0, -1.0, 0.001, math.inf, math.nan])
    def test_refuses_other_shapes(self, b: float) -> None:
        with pytest.raises(ValueError, match=r"strategy.init_args.b finite and >= 0.01, found"):
            BetaInInterval(b)

    def test_asks_no_student(self) -> None:
        for strategy in (UniformInInterval(), BetaInInterval(2.0)):
            strategy.draw(full(0.0), full(1.0), generator(), must_not_be_asked)


class TestErrorSeeking:
    """The given token's interval is [0.2, 0.7): its five tenths are the bins."""

    def counts(self, strength: float, probe: StudentProbe, size: int = 50_000) -> Tensor:
        u = ErrorSeekingInInterval(strength).draw(full(0.2, size), full(0.7, size), generator(), probe)
        assert ((u >= 0.2) & (u < 0.7)).all()
        return torch.histc(u, bins=5, min=0.2, max=0.7)

    @pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
    @pytest.mark.parametrize(
        ("own", "wrong"),
        [
            ((0.3, 0.5), [True, False, False, True, True]),  # errs on both sides
            ((0.1, 0.4), [False, False, True, True, True]),  # on the right
            ((0.5, 0.9), [True, True, True, False, False]),  # on the left
            ((0.0, 0.2), [True] * 5),  # the student's interval ends before, begins after, or is empty
            ((0.7, 1.0), [True] * 5),
            ((0.0, 0.0), [True] * 5),
            ((0.1, 0.8), [False] * 5),  # the student is correct throughout
        ],
    )
    def test_density_of_a_student_that_picks(
        self, strength: float, own: tuple[float, float], wrong: list[bool]
    ) -> None:
        share = sum(wrong) / 5
        if share in (0, 1):
            density = torch.ones(5)
        else:
            density = torch.where(torch.tensor(wrong), 1 + strength * (1 / share - 1), 1 - strength)
        assert density.min() >= 1 - strength > 0
        assert chi_square(self.counts(strength, picks_from(*own)), density / 5) < chi_square_bound(4)

    @pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
    @pytest.mark.parametrize("edge", [0.0, 0.3, 0.6, 1.0])
    def test_density_of_a_one_hot_student(self, strength: float, edge: float) -> None:
        wrong = torch.tensor([edge < bin_end - 0.05 for bin_end in (0.3, 0.4, 0.5, 0.6, 0.7)])
        share = float(wrong.double().mean())
        density = torch.where(wrong, 1 + strength * (1 - share), 1 - strength * share)
        assert density.min() >= 1 - strength > 0
        assert chi_square(self.counts(strength, correct_below(edge)), density / 5) < chi_square_bound(4)

    def test_is_asked_about_uniform_auxiliaries_once(self) -> None:
        asked: list[Tensor] = []

        def probe(u: Tensor) -> ProbeResult:
            asked.append(u)
            return ProbeResult(torch.ones_like(u, dtype=torch.bool), None)

        ErrorSeekingInInterval().draw(full(0.2), full(0.7), generator(), probe)
        assert len(asked) == 1
        assert torch.equal(asked[0], UniformInInterval()(full(0.2), full(0.7), generator()))

    def test_wrong_auxiliaries_of_a_one_hot_student_stay(self) -> None:
        first = UniformInInterval()(full(0.2), full(0.7), generator())
        u = ErrorSeekingInInterval(0.999).draw(full(0.2), full(0.7), generator(), correct_below(0.4))
        assert torch.equal(u[first >= 0.4], first[first >= 0.4])
        assert not (u == first)[first < 0.4].any()

    @pytest.mark.parametrize("strength", [-0.1, 1.0, math.nan])
    def test_refuses_a_density_with_holes(self, strength: Any) -> None:
        with pytest.raises(ValueError, match=r"strategy.init_args.strength in \[0, 1\), found"):
            ErrorSeekingInInterval(strength)
