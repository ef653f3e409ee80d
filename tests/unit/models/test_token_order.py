"""The order "embedding": a permutation, the same every time, in which similar tokens are neighbours."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptp_lightning.models.token_order import require_permutation, similar_tokens_together
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_predictors import tiny_predictor


def listing(token_embeddings: Tensor) -> list[int]:
    """Token ids in the order."""
    return similar_tokens_together(token_embeddings).argsort().tolist()


def random_table(size: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(1, 40), distinct=st.integers(1, 40), width=st.integers(1, 4))
@settings(deadline=None)
def test_is_a_permutation_even_where_tokens_are_equal(size: int, distinct: int, width: int) -> None:
    table = random_table(distinct, width)[torch.arange(size) % distinct]
    places = similar_tokens_together(table)
    assert places.dtype == torch.int64
    require_permutation(places, size)
    assert torch.equal(similar_tokens_together(table), places)


def test_equal_tokens_are_listed_by_id() -> None:
    assert listing(torch.ones(11, 3)) == list(range(11))


def test_groups_stay_together() -> None:
    """Eight tight clusters of eight, listed one after another."""
    centres = 10 * random_table(8, 16, seed=1)
    cluster = torch.randperm(64, generator=torch.Generator().manual_seed(2)) % 8
    table = centres[cluster] + 0.1 * random_table(64, 16)
    listed = cluster[torch.tensor(listing(table))].reshape(8, 8)
    assert (listed == listed[:, :1]).all()
    assert sorted(listed[:, 0].tolist()) == list(range(8))


@pytest.mark.parametrize("size", [2, 3, 16, 37, 100])
def test_tokens_on_an_arc_are_listed_along_it(size: int) -> None:
    """Every cut and every turn is right if neighbours on the arc are neighbours in the order."""
    angle = torch.linspace(0, math.pi / 2, size)
    shuffle = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    table = torch.stack([angle.cos(), angle.sin()], dim=1)[shuffle]
    # A third direction keeps the arc away from its centre, where all directions meet.
    table = torch.cat([table - table.mean(0), torch.zeros(size, 1)], dim=1) + torch.tensor([0.0, 0.0, 1.0])
    along = shuffle[torch.tensor(listing(table))].tolist()
    steps = [abs(a - b) for a, b in pairwise(along)]
    assert sum(step == 1 for step in steps) >= len(steps) - 1, along  # directions from the centre may close a circle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_depend_on_names_scale_or_parameters(dtype: torch.dtype) -> None:
    table = random_table(50, 8).to(dtype)
    expected = table[listing(table)]
    shuffled = table[torch.randperm(50, generator=torch.Generator().manual_seed(3))]
    assert torch.equal(shuffled[listing(shuffled)], expected)
    assert torch.equal(table[listing(4 * table)], expected)
    assert listing(torch.nn.Parameter(table)) == listing(table)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_table(77, 6)
    expected = listing(table)
    monkeypatch.setattr("ptp_lightning.models.token_order.CHUNK_NUMBERS", 50)
    assert listing(table) == expected


def test_neighbours_are_far_more_alike_than_in_vocabulary_order() -> None:
    table = torch.nn.functional.normalize(random_table(512, 4), dim=-1)
    ordered = table[listing(table)]
    likeness = [float((rows[1:] * rows[:-1]).sum(-1).mean()) for rows in (table, ordered)]
    assert abs(likeness[0]) < 0.1 and likeness[1] > 0.7


@pytest.mark.parametrize("places", [[0, 0, 2], [1, 2, 3], [-1, 0, 1], [0, 1], [0, 1, 2, 3]])
def test_other_numbers_are_refused(places: list[int]) -> None:
    with pytest.raises(ValueError, match=r"a permutation of 0 \.\. 2, found \d numbers that are none"):
        require_permutation(torch.tensor(places), 3)


class TestOfAPredictor:
    def test_comes_from_its_token_embeddings(self) -> None:
        predictor = tiny_predictor(sampling=SamplingConfig(order="embedding"))
        places = predictor.sampler().token_ranks
        assert places is not None
        table = predictor.base_model.get_input_embeddings().weight
        assert places.tolist() == similar_tokens_together(table).tolist()  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("order", ["vocabulary", "descending"])
    def test_other_orders_need_none(self, order: str) -> None:
        trained_in_it = tiny_predictor(sampling=SamplingConfig(order="embedding"))
        assert trained_in_it.sampler(SamplingConfig(order=order)).token_ranks is None  # pyright: ignore[reportArgumentType]
        plain = tiny_predictor(sampling=SamplingConfig(order=order))  # pyright: ignore[reportArgumentType]
        assert plain.sampler().token_ranks is None
        assert not any("token_ranks" in name for name in plain.trainable_state())

    def test_a_predictor_of_another_order_has_none(self) -> None:
        with pytest.raises(ValueError, match="order of predictor.sampling, 'vocabulary', found 'embedding'.*set"):
            tiny_predictor().sampler(SamplingConfig(order="embedding"))
