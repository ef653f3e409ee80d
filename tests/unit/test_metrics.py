"""Window metrics on windows written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptp_lightning.metrics import PositionMeans, WindowMetrics, WindowSummary, as_tags


def rows(*windows: str) -> tuple[Tensor, Tensor]:
    """Windows as (correct, mask): "1" correct, "0" wrong; past the end "x" correct by chance, "." wrong."""
    correct = torch.tensor([[c in "1x" for c in window] for window in windows])
    mask = torch.tensor([[c in "10" for c in window] for window in windows])
    return correct, mask


WINDOWS = ("1111", "1101", "0111", "11xx", "1...", "xxxx")


def summary_of(*windows: str, nll: Tensor | None = None, length: int = 4) -> WindowSummary:
    metrics = WindowMetrics(length)
    metrics.update(*rows(*windows), nll)
    return metrics.compute()


def test_correct_prefixes() -> None:
    summary = summary_of(*WINDOWS)
    assert summary.prefix_counts.tolist() == [1, 1, 2, 0, 1]  # lengths 4, 2, 0, 2, 1; the last window is empty
    assert summary.num_windows == 5
    assert summary.correct_tokens == 9 / 5
    # deviations 2.2, 0.2, -1.8, 0.2, -0.8; squares add up to 8.8
    assert summary.standard_error.item() == pytest.approx(math.sqrt(8.8 / 4 / 5))


def test_accuracy_by_position() -> None:
    summary = summary_of(*WINDOWS)
    assert summary.num_positions.tolist() == [5, 4, 3, 3]
    assert summary.accuracy.tolist() == [4 / 5, 4 / 4, 2 / 3, 3 / 3]


def test_accuracy_given_a_correct_prefix() -> None:
    summary = summary_of(*WINDOWS)
    # Position 3 is reached with everything correct by "1111" alone.
    assert summary.num_given_prefix.tolist() == [5, 3, 2, 1]
    assert summary.accuracy_given_prefix.tolist() == [4 / 5, 3 / 3, 1 / 2, 1 / 1]


def test_perplexity_by_position_reads_valid_positions_only() -> None:
    nll = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, math.nan]])
    summary = summary_of("10.", "1..", nll=nll, length=3)
    assert summary.num_likelihoods.tolist() == [2, 1, 0]
    assert summary.perplexity[:2].tolist() == pytest.approx([math.exp(2), math.exp(2)])
    assert [tag for tag in as_tags(summary) if "perplexity" in tag] == [
        "val/perplexity/position_00",
        "val/perplexity/position_01",
    ]


def test_a_broken_likelihood_is_shown() -> None:
    summary = summary_of("11", nll=torch.tensor([[1.0, math.nan]]), length=2)
    assert math.isnan(as_tags(summary)["val/perplexity/position_01"])


def test_tags() -> None:
    tags = as_tags(summary_of("10..", "0..."), prefix="test")
    assert tags == {
        "test/correct_tokens": 0.5,
        "test/correct_tokens_standard_error": 0.5,
        "test/accuracy/position_00": 0.5,
        "test/accuracy/position_01": 0.0,
        "test/accuracy_given_prefix/position_00": 0.5,
        "test/accuracy_given_prefix/position_01": 0.0,
    }


def test_a_position_that_is_never_reached_correctly_has_no_conditional_accuracy() -> None:
    tags = as_tags(summary_of("0111"))
    assert "val/accuracy/position_03" in tags
    assert "val/accuracy_given_prefix/position_00" in tags
    assert "val/accuracy_given_prefix/position_01" not in tags
    assert "val/correct_tokens_standard_error" not in tags  # one window


@pytest.mark.parametrize("windows", [["...."], []])
def test_nothing_valid_gives_no_tags(windows: list[str]) -> None:
    metrics = WindowMetrics(4)
    correct, mask = rows(*windows) if windows else (torch.zeros(0, 4, dtype=torch.bool),) * 2
    metrics.update(correct, mask)
    assert as_tags(metrics.compute()) == {}


def test_windows_of_one_token() -> None:
    tags = as_tags(summary_of("1", "0", "1", "1", length=1, nll=torch.ones(4, 1)))
    assert tags["val/correct_tokens"] == 0.75
    assert tags["val/accuracy/position_00"] == 0.75
    assert tags["val/perplexity/position_00"] == pytest.approx(math.e)


def test_two_ranks_and_many_batches_equal_one() -> None:
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(3, 7, 5, generator=generator) < 0.6  # rows, windows, tokens
    mask = torch.arange(5) < torch.randint(6, (3, 7, 1), generator=generator)
    nll = torch.rand(3, 7, 5, generator=generator)
    whole, first_rank, second_rank = WindowMetrics(5), WindowMetrics(5), WindowMetrics(5)
    whole.update(correct, mask, nll)
    first_rank.update(correct[0], mask[0], nll[0])
    second_rank.update(correct[1], mask[1], nll[1])
    second_rank.update(correct[2, :, :], mask[2], nll[2])
    first_rank.merge_state(second_rank)
    assert whole.compute().num_windows > 10
    for merged, expected in zip(first_rank.compute(), whole.compute(), strict=True):
        torch.testing.assert_close(merged, expected, equal_nan=True)


def test_every_state_is_summed_over_ranks() -> None:
    metrics = WindowMetrics(3)
    assert len(metrics._reductions) == 6
    for reduction in metrics._reductions.values():
        assert callable(reduction)
        assert reduction(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [5, 7, 9]


def test_reset() -> None:
    metrics = WindowMetrics(4)
    metrics.update(*rows("1111"))
    metrics.reset()
    metrics.update(*rows("10.."))
    assert metrics.compute().prefix_counts.tolist() == [0, 1, 0, 0, 0]


def test_counts_are_exact_far_beyond_float32() -> None:
    metrics = WindowMetrics(2)
    metrics.update(*rows("11", "10"))
    metrics.prefix_counts += torch.tensor([0, 2**24, 0])
    assert metrics.compute().num_windows == 2**24 + 2
    assert metrics.compute().prefix_counts.tolist() == [0, 2**24 + 1, 1]


def test_bad_input() -> None:
    correct, mask = rows("1111")
    with pytest.raises(ValueError, match="window_length: 0"):
        WindowMetrics(0)
    with pytest.raises(ValueError, match="window_length"):
        WindowMetrics(5).update(correct, mask)
    with pytest.raises(ValueError, match=r"\[1, 4\], \[1, 3\]"):
        WindowMetrics(4).update(correct, mask[:, :3])
    with pytest.raises(ValueError, match="hole"):
        WindowMetrics(4).update(*rows("1.11"))


class TestPositionMeans:
    def test_by_hand(self) -> None:
        means = PositionMeans(3)
        means.update(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]))
        means.update(torch.tensor([[5.0, 100.0]]), torch.tensor([[0, 3]]))  # position 3 is beyond
        assert means.compute() == {0: 3.0, 2: 4.0}
        means.reset()
        assert means.compute() == {}

    def test_small_terms_are_not_lost(self) -> None:
        means = PositionMeans(1)
        means.update(torch.tensor([2.0**26]), torch.zeros(1, dtype=torch.int64))
        for _ in range(3):
            means.update(torch.ones(1), torch.zeros(1, dtype=torch.int64))
        assert means.compute() == {0: (2.0**26 + 3) / 4}


def test_sums_keep_their_number_format() -> None:
    """`trainer.precision: bf16-true` casts the module that metrics are part of."""
    holder = torch.nn.ModuleList([WindowMetrics(2), PositionMeans(2)]).to(torch.bfloat16)
    metrics, means = holder
    assert isinstance(metrics, WindowMetrics) and isinstance(means, PositionMeans)
    assert metrics.nats.dtype == means.totals.dtype == torch.float64
    means.reset()
    means.update(torch.tensor([1.0, 1 / 512]), torch.tensor([0, 0]))
    assert means.compute() == {0: (1 + 1 / 512) / 2}  # bfloat16 has no room for it
