"""RecordedSeries and SeriesDataModule on consecutive integers, so that rows are readable."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.series.series import RecordedSeries
from ptp_lightning.data.series.series_datamodule import SeriesDataModule
from ptp_lightning.testing import check_series


@dataclass(frozen=True)
class Counting(RecordedSeries):
    """Blocks of consecutive numbers, at (first number, length)."""

    ranges: dict[Split, list[tuple[int, int]]] = field(
        default_factory=lambda: {"train": [(0, 10), (100, 4), (200, 7)], "val": [(50, 9), (70, 5)], "test": [(90, 3)]}
    )

    @property
    def vocab_size(self) -> int:
        return 300

    def blocks(self, split: Split) -> list[np.ndarray]:
        return [np.arange(first, first + length) for first, length in self.ranges[split]]


def make_data(**settings: Any) -> SeriesDataModule:
    defaults: dict[str, Any] = {"row_length": 5, "batch_size": 3, "num_windows": 2, "eval_rows": 8}
    return SeriesDataModule(Counting(), **(defaults | settings))


def take(loader: Any, count: int) -> list[PackedBatch]:
    return list(islice(loader, count))


def all_same(left: list[PackedBatch], right: list[PackedBatch]) -> bool:
    return all(torch.equal(*tensors) for pair in zip(left, right, strict=True) for tensors in zip(*pair, strict=True))


def on_trainer(data: SeriesDataModule, **state: int) -> SeriesDataModule:
    defaults = {"global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
    data.trainer = SimpleNamespace(**(defaults | state))  # pyright: ignore[reportAttributeAccessIssue]
    return data


class TestRecordedSeries:
    def test_contract(self) -> None:
        check_series(Counting(), length=3)

    def test_rows_start_anywhere_in_a_block_and_never_cross_one(self) -> None:
        rows = Counting().row_sampler("train", 4)(4000, torch.Generator().manual_seed(0))
        assert bool((rows.diff(dim=1) == 1).all())
        first, counts = rows[:, 0].unique(return_counts=True)
        assert first.tolist() == [*range(7), 100, *range(200, 204)]
        assert int(counts.min()) > 4000 / 12 * 0.75  # all positions are equally likely

    def test_fixed_rows_do_not_overlap(self) -> None:
        assert Counting().fixed_rows("val", 4, 100).tolist() == [[50, 51, 52, 53], [54, 55, 56, 57], [70, 71, 72, 73]]

    def test_fixed_rows_are_evenly_spaced(self) -> None:
        assert Counting().fixed_rows("train", 2, 5)[:, 0].tolist() == [0, 4, 8, 102, 202]

    def test_tokens_are_the_blocks(self) -> None:
        assert Counting().tokens("val").tolist() == [*range(50, 59), *range(70, 75)]

    def test_no_block_is_long_enough(self) -> None:
        with pytest.raises(ValueError, match="at least 4 tokens in the test split, found 1 shorter.*data.row_length"):
            Counting().fixed_rows("test", 4, 1)

    def test_no_block_at_all(self) -> None:
        with pytest.raises(ValueError, match="found 0 shorter"):
            Counting({"train": []}).row_sampler("train", 2)


class TestSeriesDataModule:
    def test_a_row_starts_with_bos(self) -> None:
        data = make_data()
        batch = take(data.train_dataloader(), 1)[0]
        assert data.vocab_size == 301 and data.end_of_text is None and data.tokenizer is None
        assert batch.input_ids.shape == (3, 5) and batch.window_starts.shape == (3, 2)
        assert batch.input_ids[:, 0].tolist() == [300] * 3
        assert bool((batch.input_ids[:, 1:].diff(dim=1) == 1).all())
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
        assert batch.document_ids.tolist() == [[0] * 5] * 3
        assert batch.completion_mask.tolist() == [[False, True, True, True, True]] * 3

    @pytest.mark.parametrize(
        ("min_context", "max_context", "expected"),
        [(0, 0, {1}), (0, None, {1, 2, 3, 4}), (1, 2, {2, 3}), (3, None, {4})],
    )
    def test_context_range_of_windows(self, min_context: int, max_context: int | None, expected: set[int]) -> None:
        data = make_data(min_context=min_context, max_context=max_context)
        batches = [*take(data.train_dataloader(), 30), *data.val_dataloader()]
        assert {start for batch in batches for start in batch.window_starts.flatten().tolist()} == expected

    def test_seeds(self) -> None:
        first, again, other = (take(make_data(seed=seed).train_dataloader(), 8) for seed in (3, 3, 4))
        assert all_same(first, again) and not all_same(first, other)
        assert not torch.equal(first[0].input_ids, first[1].input_ids)

    def test_resumes_from_a_checkpoint(self) -> None:
        whole = take(make_data().train_dataloader(), 10)
        state = on_trainer(make_data(), global_step=3, accumulate_grad_batches=2).state_dict()
        assert state["batches_consumed"] == 6
        resumed = on_trainer(make_data(), global_step=3)
        resumed.load_state_dict(state)
        assert all_same(whole[6:], take(resumed.train_dataloader(), 4))

    def test_ranks_draw_different_rows_and_partition_the_fixed_ones(self) -> None:
        left, right = (on_trainer(make_data(batch_size=8), global_rank=rank, world_size=2) for rank in (0, 1))
        assert not torch.equal(*(take(data.train_dataloader(), 1)[0].input_ids for data in (left, right)))
        first = [row for data in (left, right) for batch in data.val_dataloader() for row in batch.input_ids.tolist()]
        assert sorted(row[1] for row in first) == [50, 54, 70]

    def test_evaluation_rows_are_fixed(self) -> None:
        data = make_data(batch_size=2)
        first, again, other = (list(module.val_dataloader()) for module in (data, data, make_data(batch_size=2)))
        assert all_same(first, again) and all_same(first, other)
        assert [batch.input_ids[:, 1].tolist() for batch in first] == [[50, 54], [70]]

    @pytest.mark.parametrize(
        ("key", "value"),
        [("row_length", 1), ("batch_size", 0), ("num_windows", 0), ("eval_rows", 0), ("min_context", -1)],
    )
    def test_sizes(self, key: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"data.{key} >= .*{value}"):
            make_data(**{key: value})

    @pytest.mark.parametrize(("min_context", "max_context"), [(0, 4), (3, 2), (4, None)])
    def test_context_without_room_for_a_window(self, min_context: int, max_context: int | None) -> None:
        with pytest.raises(ValueError, match="data.max_context"):
            make_data(min_context=min_context, max_context=max_context)
