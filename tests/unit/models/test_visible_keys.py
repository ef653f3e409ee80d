"""Groups of windows: each window once, each group with the context its windows see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp_lightning.models.attention import block_attention
from ptp_lightning.models.attention.block_attention import Group, VisibleKeys
from ptp_lightning.models.attention.masks import sees_context

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
STARTS = torch.tensor([[1, 3, 5, 7], [2, 4, 6, 7]])
SEEN = sees_context(DOCUMENTS, STARTS)
OWN = torch.ones(2, 2, dtype=torch.bool).tril()


@pytest.fixture
def two_windows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "MAX_GROUP_SCORES_CPU", 1)
    monkeypatch.setattr(block_attention, "MIN_GROUP_WINDOWS", 2)


@pytest.mark.usefixtures("two_windows_at_once")
def test_by_hand() -> None:
    """Windows of the first document see no token of the second, those of the second none of the first."""
    assert VisibleKeys(SEEN, OWN).groups(num_heads=1) == [
        Group(slice(0, 1), slice(0, 2), slice(0, 3)),
        Group(slice(0, 1), slice(2, 4), slice(4, 7)),
        Group(slice(1, 2), slice(0, 2), slice(0, 4)),
        Group(slice(1, 2), slice(2, 4), slice(0, 7)),
    ]


def test_small_rows_attend_together() -> None:
    assert VisibleKeys(SEEN, OWN).groups(num_heads=1) == [Group(slice(0, 2), slice(0, 4), slice(0, 7))]


@pytest.mark.usefixtures("two_windows_at_once")
def test_rows_stay_whole_where_values_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "allows_dynamic_shapes", lambda tensor: False)
    everything = Group(slice(0, 2), slice(0, 4), slice(0, 8))
    assert VisibleKeys(SEEN, OWN).groups(num_heads=1) == [everything]
    scores_of_a_row = 4 * 2 * (8 + 2)
    monkeypatch.setattr(block_attention, "MAX_GROUP_SCORES_GPU", 2 * scores_of_a_row - 1)
    by_row = [everything._replace(rows=slice(row, row + 1)) for row in range(2)]
    assert VisibleKeys(SEEN, OWN).groups(num_heads=1) == by_row


@pytest.mark.usefixtures("two_windows_at_once")
def test_biases_hide_what_is_not_seen() -> None:
    visible = VisibleKeys(SEEN, OWN)
    group = Group(slice(0, 1), slice(2, 4), slice(4, 7))
    of_context, of_own = visible.biases(group, torch.float64)
    assert of_context.tolist() == [[[0, -math.inf, -math.inf], [0, 0, 0]]]
    assert of_own.tolist() == [[0, -math.inf], [0, 0]]
    assert of_context.dtype == of_own.dtype == torch.float64


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 4000),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_every_window_is_in_one_group_that_holds_all_it_sees(
    num_rows: int, num_windows: int, size: int, scores: int, least: int, seed: int
) -> None:
    seen = torch.rand(num_rows, num_windows, size, generator=torch.Generator().manual_seed(seed)) < 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "MAX_GROUP_SCORES_CPU", scores)
        patch.setattr(block_attention, "MIN_GROUP_WINDOWS", least)
        groups = VisibleKeys(seen, OWN).groups(num_heads=3)
    times = torch.zeros(num_rows, num_windows, dtype=torch.long)
    for rows, windows, columns in groups:
        times[rows, windows] += 1
        part = seen[rows, windows]
        assert part[..., columns].sum() == part.sum()
        of_window = 3 * 2 * (size + 2)
        assert part[..., 0].numel() <= max(scores // of_window, least)
    assert (times == 1).all()
