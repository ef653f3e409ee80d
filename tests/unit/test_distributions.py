"""Distributions that are made when they are asked for are those that were there all along."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptp_lightning import distributions
from ptp_lightning.auxiliary import pick, token_interval
from ptp_lightning.distributions import LazyDistributions, chunked_pick, chunked_token_interval
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution

SHAPE, H, V = (2, 3, 4), 5, 11


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "chunk_rows", lambda vocab_size, hidden: 7)  # of 24
    monkeypatch.setattr(distributions, "block_rows", lambda vocab_size, hidden: 3)


def lazy(config: SamplingConfig, *, is_target: bool = False) -> LazyDistributions:
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/16 have exact products: logits do not depend on how many rows a matrix product has.
    hidden, weight = (
        torch.randn(*shape, H, generator=generator, dtype=torch.float64).mul(16).round().div(16)
        for shape in (SHAPE, (V,))
    )
    return LazyDistributions(hidden, lambda states: states @ weight.T, Sampler(config), is_target)


CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5, top_p=0.8),
    SamplingConfig(top_k=4, top_p=0.8, order="descending"),
    SamplingConfig(temperature=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("is_target", [False, True])
class TestAsIfTheyWereThere:
    def stored(self, config: SamplingConfig, is_target: bool) -> TokenDistribution:
        made = lazy(config)
        return config.teacher_and_target(made.head(made.hidden))[int(is_target)]

    @pytest.mark.parametrize(
        "index", [0, (..., 0), (..., slice(1, None)), (torch.tensor([1, 0]), torch.tensor([2, 0]))]
    )
    def test_some_of_them(self, config: SamplingConfig, is_target: bool, index: object) -> None:
        found, expected = lazy(config, is_target=is_target).at(index), self.stored(config, is_target).at(index)
        assert found.shape == expected.shape == torch.empty(SHAPE)[index].shape  # pyright: ignore
        assert_equal(found.materialize(), expected)
        assert_equal(found.flatten().materialize(), expected.flatten())

    def test_blocks(self, config: SamplingConfig, is_target: bool) -> None:
        several = list(lazy(config, is_target=is_target).flatten().blocks(7))
        assert [len(block.probabilities) for block in several] == [7, 7, 7, 3]
        for found, expected in zip(several, self.stored(config, is_target).flatten().blocks(7), strict=True):
            assert_equal(found, expected)

    def test_picks_and_intervals(self, config: SamplingConfig, is_target: bool) -> None:
        P = self.stored(config, is_target)
        u = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        token_ids = pick(u, P)
        assert torch.equal(chunked_pick(u, lazy(config, is_target=is_target)), token_ids)
        assert torch.equal(chunked_pick(u, P), token_ids)
        for found, expected in zip(
            chunked_token_interval(lazy(config, is_target=is_target), token_ids),
            token_interval(P, token_ids),
            strict=True,
        ):
            assert torch.equal(found, expected)


def assert_equal(found: TokenDistribution, expected: TokenDistribution) -> None:
    torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-12, rtol=0)
    assert (found.token_ids is None) == (expected.token_ids is None)
    assert found.token_ids is None or expected.token_ids is None or torch.equal(found.token_ids, expected.token_ids)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30).filter(any), st.data())
def test_an_interval_has_the_very_ends_that_the_cdf_has(weights: list[float], data: st.DataObject) -> None:
    probabilities: Tensor = torch.tensor(weights, dtype=torch.float32)
    P = TokenDistribution(probabilities / probabilities.sum())
    index = data.draw(st.integers(0, len(weights) - 1))
    lower, upper = P.interval(torch.tensor(index))
    F = torch.cat([torch.zeros(1, dtype=torch.float64), P.cdf()])
    assert (lower, upper) == (F[index], F[index + 1])
