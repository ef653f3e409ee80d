"""pick and token_interval: inverse to each other, exact at the edges, and true to the distribution."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, likely_pick, pick, token_interval
from ptp_lightning.auxiliary_strategies import UniformInInterval
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution
from tests.helpers.goodness_of_fit import chi_square, chi_square_bound

INF = math.inf
LARGEST_FLOAT64 = 1 - 2.0**-53  # the largest below 1
LARGEST_FLOAT32 = 1 - 2.0**-24
EDGES = [0.0, 5e-324, 2.0**-53, 0.5, LARGEST_FLOAT32, LARGEST_FLOAT64]
CONFIGS = [
    SamplingConfig(),
    SamplingConfig(order="vocabulary"),
    SamplingConfig(0.7, top_k=4, top_p=0.9),
    SamplingConfig(0.7, top_k=4, top_p=0.9, order="vocabulary"),
    SamplingConfig(1.5, top_p=0.8, order="vocabulary"),
    SamplingConfig(0.0),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_ids(P: TokenDistribution) -> Tensor:
    """Every listed token: `[K]` for P of shape `[K]`."""
    return torch.arange(len(P.probabilities)) if P.token_ids is None else P.token_ids


def dense(P: TokenDistribution, vocabulary_size: int) -> Tensor:
    """Probabilities of P `[K]` by token id: `[V]`, float64."""
    return torch.zeros(vocabulary_size, dtype=torch.float64).index_add(0, all_ids(P), P.probabilities.double())


def repeat(P: TokenDistribution, times: int) -> TokenDistribution:
    """P `[K]` as `[times, K]`."""
    token_ids = None if P.token_ids is None else P.token_ids.expand(times, -1)
    return TokenDistribution(P.probabilities.expand(times, -1), token_ids)


def assert_inverse(P: TokenDistribution) -> None:
    """For P `[K]`: both ends of every interval pick its token, and the intervals tile [0, 1)."""
    ids = all_ids(P)
    lower, upper = token_interval(repeat(P, len(ids)), ids)
    alive = lower < upper
    assert torch.equal(alive, P.probabilities >= 2.0**-53)
    ids, lower, upper = ids[alive], lower[alive], upper[alive]
    rows = repeat(P, len(ids))
    for u in (lower, torch.nextafter(upper, lower), UniformInInterval()(lower, upper, generator())):
        assert torch.equal(pick(u, rows), ids)
    assert lower[0] == 0
    assert upper[-1] == 1
    assert torch.equal(lower[1:], upper[:-1])


@st.composite
def tied_logits(draw) -> Tensor:
    values = st.sampled_from([-INF, -30.0, -1.0, 0.0, 1.0, 1.0 + 2.0**-23, 30.0])
    row = draw(st.lists(values | st.floats(-20, 20, width=32), min_size=1, max_size=12))
    row[draw(st.integers(0, len(row) - 1))] = 0.5  # never -inf throughout
    return torch.tensor(row, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


@given(logits=tied_logits(), config=st.sampled_from(CONFIGS), u=st.sampled_from(EDGES) | st.floats(0, LARGEST_FLOAT64))
@settings(deadline=None, max_examples=300)
def test_pick_and_token_interval_are_inverse(logits: Tensor, config: SamplingConfig, u: float):
    P = config.distribution(logits)
    assert_inverse(P)
    token = pick(torch.tensor(u, dtype=torch.float64), P)
    lower, upper = token_interval(P, token)
    assert lower <= u < upper
    assert P.probability_of(token) > 0
    assert logits[token] > -INF


@given(
    logits=tied_logits(), top_k=st.none() | st.integers(1, 12), top_p=st.sampled_from([0.5, 0.9, 1.0]), data=st.data()
)
@settings(deadline=None, max_examples=300)
def test_pick_and_token_interval_are_inverse_in_any_fixed_order(
    logits: Tensor, top_k: int | None, top_p: float, data: st.DataObject
):
    ranks = torch.tensor(data.draw(st.permutations(range(len(logits)))))
    P = Sampler(SamplingConfig(0.7, top_k, top_p, "embedding"), ranks).distribution(logits)
    assert_inverse(P)
    assert (ranks[all_ids(P)].diff() > 0).all()


@pytest.mark.parametrize("order", ["descending", "vocabulary", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverse_over_150k_entries(dtype: torch.dtype, order):
    logits = torch.randn(4, 150_000, generator=generator()).to(dtype)  # bfloat16: some hundred distinct values
    logits[1] = 0.0  # all tied
    logits[2] *= 10  # most entries far below one part in 2^53
    logits[3, 77_777] = 1e4  # one-hot
    ranks = torch.randperm(150_000, generator=generator())
    P = Sampler(SamplingConfig(order=order), ranks).distribution(logits)
    for u in (*EDGES, *draw_auxiliaries((20,), generator(), "cpu").tolist()):
        u_rows = torch.full((4,), u, dtype=torch.float64)
        tokens = pick(u_rows, P)
        lower, upper = token_interval(P, tokens)
        assert ((lower <= u_rows) & (u_rows < upper)).all()
        assert (P.probability_of(tokens) > 0).all()
        for edge in (lower, torch.nextafter(upper, lower)):
            assert torch.equal(pick(edge, P), tokens)
        assert tokens[3] == 77_777
    largest = torch.full((4,), LARGEST_FLOAT64, dtype=torch.float64)
    # Among equals, rank and vocabulary order end with the highest id.
    assert pick(largest, P)[1] == (ranks.argmax() if order == "embedding" else 149_999)


def naive_inverse_cdf(u: float, probabilities: list[float]) -> int:
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if total > u:
            return token
    raise AssertionError("u beyond the last token")


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (6, 1.0), (None, 0.8), (6, 0.8), (50, 0.8)])
def test_vocabulary_order_is_the_inverse_cdf_over_the_vocabulary(top_k: int | None, top_p: float, temperature: float):
    logits = torch.randn(10, generator=generator()) * 2
    P = SamplingConfig(temperature, top_k, top_p, order="vocabulary").distribution(logits)
    # By hand: softmax, then the smallest set of most likely tokens, renormalised.
    weights = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(10), key=lambda token: -weights[token])[:top_k]
    total = sum(weights[token] for token in ranked)
    kept = [t for n, t in enumerate(ranked) if sum(weights[s] for s in ranked[:n]) < top_p * total]
    total = sum(weights[token] for token in kept)
    probabilities = [weights[token] / total if token in kept else 0.0 for token in range(10)]

    u = draw_auxiliaries((2000,), generator(), "cpu")
    assert pick(u, repeat(P, 2000)).tolist() == [naive_inverse_cdf(x, probabilities) for x in u.tolist()]


def test_pick_by_hand():
    P = TokenDistribution(torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]))
    u = torch.tensor([0.0, 0.25, 0.5, 0.625, 0.75, LARGEST_FLOAT64], dtype=torch.float64)
    assert pick(u, repeat(P, 6)).tolist() == [1, 1, 3, 3, 4, 4]  # F_j > u: a boundary belongs to the next token
    listed = TokenDistribution(P.probabilities, torch.tensor([9, 8, 7, 6, 5, 4]))
    assert pick(u, repeat(listed, 6)).tolist() == [8, 8, 6, 6, 5, 5]


def test_token_interval_by_hand():
    P = TokenDistribution(torch.tensor([0.5, 0.0, 0.25, 0.25]), torch.tensor([7, 3, 1, 4]))
    tokens = torch.tensor([7, 1, 4])
    lower, upper = token_interval(repeat(P, 3), tokens)
    assert lower.tolist() == [0, 0.5, 0.75]
    assert upper.tolist() == [0.5, 0.75, 1]
    # No interval: removed (3) or not listed (0, -1). Both ends are 0, a valid auxiliary for a masked slot.
    lower, upper = token_interval(repeat(P, 3), torch.tensor([3, 0, -1]))
    assert lower.tolist() == upper.tolist() == [0, 0, 0]
    assert UniformInInterval()(lower, upper, generator()).tolist() == [0, 0, 0]
    lower, upper = token_interval(TokenDistribution(torch.tensor([[0.0, 1.0]] * 4)), torch.tensor([0, 1, 2, -1]))
    assert lower.tolist() == [0, 0, 0, 0]
    assert upper.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_u_of_every_float_dtype_is_read_in_float64(dtype: torch.dtype):
    P = TokenDistribution(torch.tensor([1 / 3, 1 / 3, 1 / 3]))
    largest = torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    for u in (torch.tensor(0.0, dtype=dtype), largest, torch.tensor(1 / 3, dtype=dtype)):
        lower, upper = token_interval(P, pick(u, P))
        assert lower <= u.double() < upper


def test_a_step_below_a_boundary_is_another_token():
    """Float32 cannot tell these two auxiliaries apart."""
    P = TokenDistribution(torch.tensor([0.5, 0.5]))
    below = math.nextafter(0.5, 0)
    assert pick(torch.tensor(below, dtype=torch.float64), P) == 0
    assert pick(torch.tensor(0.5, dtype=torch.float64), P) == 1


@pytest.mark.parametrize("bad", [1.0, -1e-12, math.nan, INF])
def test_u_outside_the_unit_interval_raises(bad: float):
    P = TokenDistribution(torch.full((2, 4), 0.25))
    with pytest.raises(ValueError, match=r"auxiliaries u must lie in \[0, 1\); found .* \(1 of 2\)"):
        pick(torch.tensor([0.5, bad], dtype=torch.float64), P)


def test_a_shape_unlike_the_distribution_raises():
    P = TokenDistribution(torch.full((2, 3, 4), 0.25))
    with pytest.raises(ValueError, match=r"u must have the leading shape \(2, 3\) of P, found \(3,\)"):
        pick(torch.zeros(3), P)
    with pytest.raises(ValueError, match=r"token_ids must have the leading shape \(2, 3\) of P, found \(3, 2\)"):
        token_interval(P, torch.zeros(3, 2, dtype=torch.int64))


def test_any_leading_shape():
    P = SamplingConfig(top_k=3).distribution(torch.randn(2, 3, 4, 9, generator=generator()))
    u = draw_auxiliaries((2, 3, 4), generator(), "cpu")
    tokens = pick(u, P)
    lower, upper = token_interval(P, tokens)
    assert tokens.shape == lower.shape == upper.shape == (2, 3, 4)
    assert tokens.dtype == torch.int64
    assert ((lower <= u) & (u < upper)).all()


@pytest.mark.parametrize("config", CONFIGS[:-1])
def test_frequencies_of_pick_follow_the_distribution(config: SamplingConfig):
    num_draws = 100_000
    logits = torch.tensor([0.0, 2.0, -INF, 1.0, 1.0, -3.0, 0.5])
    P = config.distribution(logits)
    tokens = pick(draw_auxiliaries((num_draws,), generator(), "cpu"), repeat(P, num_draws))
    counts = torch.bincount(tokens, minlength=7).double()
    expected = dense(P, 7)
    support = expected > 0
    assert (counts[~support] == 0).all()
    assert chi_square(counts[support], expected[support]) < chi_square_bound(int(support.sum()) - 1)


@pytest.mark.parametrize("config", CONFIGS[:-1])
def test_an_even_grid_of_u_gives_each_token_its_share(config: SamplingConfig):
    """Without chance: a share of p among n evenly spaced auxiliaries is n p up to rounding at its two ends."""
    n = 10_000
    P = config.distribution(torch.tensor([0.0, 2.0, -INF, 1.0, 1.0, -3.0, 0.5]))
    tokens = pick((torch.arange(n, dtype=torch.float64) + 0.5) / n, repeat(P, n))
    counts = torch.bincount(tokens, minlength=7)
    assert ((counts - n * dense(P, 7)).abs() <= 1.01).all()


def test_auxiliaries_are_float64_and_repeat_with_the_seed():
    first, second = (draw_auxiliaries((2, 500), generator(7), "cpu") for _ in range(2))
    assert first.dtype == torch.float64
    assert first.shape == (2, 500)
    assert torch.equal(first, second)
    assert not torch.equal(first, first.float().double())  # all 53 bits are drawn
    assert ((first >= 0) & (first < 1)).all()
    state = generator(7)
    assert not torch.equal(*(draw_auxiliaries((500,), state, "cpu") for _ in range(2)))  # the state moves on


class TestLikelyPick:
    P = TokenDistribution(torch.tensor([0.2, 0.0, 0.01, 0.79]), torch.tensor([7, 3, 5, 4]))

    @pytest.mark.parametrize(
        ("u", "error", "expected"),
        [
            (0.205, 0.0, 5),  # its own narrow interval
            (0.205, 0.001, 5),  # five standard deviations away from either end
            (0.205, 0.05, 4),  # more likely a miss: both neighbours are as near, one is wider
            (0.19, 0.05, 7),
            (0.0, 0.05, 7),  # nothing lies below 0
            (0.0, 0.9, 4),  # u says little: the most likely token
            (0.1, 0.5, 4),
        ],
    )
    def test_by_hand(self, u: float, error: float, expected: int) -> None:
        P = repeat(self.P, 1)
        assert likely_pick(torch.tensor([u], dtype=torch.float64), P, error).tolist() == [expected]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, LARGEST_FLOAT64), st.floats(1e-4, 2))
    def test_against_a_loop(self, weights: list[float], u: float, error: float) -> None:
        if sum(weights) < 1e-3:
            weights[0] = 1.0
        P = TokenDistribution(torch.tensor(weights, dtype=torch.float64) / sum(weights))
        F = [0.0, *P.cdf().tolist()]

        def mass(left: float, right: float) -> float:
            return 0.5 * (math.erfc((u - right) / error / math.sqrt(2)) - math.erfc((u - left) / error / math.sqrt(2)))

        scores = [
            mass(left, right) + mass(-right, -left) + mass(2 - right, 2 - left) for left, right in itertools.pairwise(F)
        ]
        found = int(likely_pick(torch.tensor([u], dtype=torch.float64), repeat(P, 1), error))
        assert scores[found] >= max(scores) - 1e-12
        assert P.probabilities[found] > 0

    @given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
    def test_a_tiny_error_changes_nothing_inside_an_interval(self, weights: list[float], position: float) -> None:
        P = TokenDistribution(torch.tensor(weights, dtype=torch.float64) / sum(weights))
        rows = repeat(P, len(weights))
        lower, upper = token_interval(rows, torch.arange(len(weights)))
        u = lower + (0.1 + 0.8 * position) * (upper - lower)
        assert torch.equal(likely_pick(u, rows, 1e-6), pick(u, rows))

    @pytest.mark.parametrize("u", [-0.1, 1.0, math.nan])
    def test_u_outside(self, u: float) -> None:
        with pytest.raises(ValueError, match="must lie in"):
            likely_pick(torch.tensor([u]), repeat(self.P, 1), 0.1)
