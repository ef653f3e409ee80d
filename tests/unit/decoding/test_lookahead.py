"""Where slots stand and what they see, against the definition spelled out for every pair; and rows that grow apart."""

from typing import cast

import pytest
import torch
from torch import Tensor

from ptp_lightning.decoding.lookahead import Lookahead, positions_and_mask
from ptp_lightning.decoding.ragged_cache import RaggedCache

CPU = torch.device("cpu")


def test_branches_of_two_rows() -> None:
    found = Lookahead.branches([1, 3], [[2, 0, 1], [1, 1]], CPU)
    assert found.anchors.tolist() == [[0, 0, 2], [2, 3, -1]]
    assert found.offsets.tolist() == [[0, 1, 0], [0, 0, 0]]


def test_a_single_branch_follows_the_last_token() -> None:
    found = Lookahead.single([1, 3], 2, CPU)
    assert found.anchors.tolist() == [[0, 0], [2, 2]]
    assert found.offsets.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("lengths", [[4, 4], [0, 3], [5, 2]])
def test_positions_and_attention(lengths: list[int]) -> None:
    num_tokens = 4
    lookahead = Lookahead.branches([2, 1], [[2, 1], [0, 1, 2]], CPU)
    position_ids, mask = positions_and_mask(lengths, num_tokens, lookahead, CPU)
    num_slots = lookahead.anchors.shape[1]
    assert mask.shape == (2, 1, num_tokens + num_slots, max(lengths) + num_tokens + num_slots)
    for row, kept in enumerate(lengths):
        slots = list(zip(lookahead.anchors[row].tolist(), lookahead.offsets[row].tolist(), strict=True))
        for query in range(num_tokens + num_slots):
            is_slot = query >= num_tokens
            anchor, offset = slots[query - num_tokens] if is_slot else (query, 0)
            assert position_ids[row, query] == kept + anchor + (1 + offset if is_slot else 0)
            for key in range(mask.shape[-1]):
                column = key - kept
                if column < 0:
                    sees = True  # kept tokens
                elif column < num_tokens:
                    sees = column <= anchor
                elif column < num_tokens + num_slots:
                    other, place_there = slots[column - num_tokens]
                    sees = is_slot and other == anchor and place_there <= offset
                else:
                    sees = False  # after the end of a shorter row
                assert mask[row, 0, query, key] == sees, (row, query, key)


def states(values: list[list[int]]) -> Tensor:
    """Keys or values `[B, heads = 1, T, size = 1]`."""
    return torch.tensor(values, dtype=torch.float32)[:, None, :, None]


class TestRaggedCache:
    def written(self, cache: RaggedCache, values: list[list[int]]) -> list[list[float]]:
        keys, also = cache.update(states(values), states(values), 0)
        assert torch.equal(keys, also)
        return cast("list[list[float]]", keys[:, 0, :, 0].tolist())

    def test_rows_keep_different_numbers(self) -> None:
        cache = RaggedCache(2, capacity=8)
        assert self.written(cache, [[1, 2, 3], [4, 5, 6]]) == [[1, 2, 3], [4, 5, 6]]
        cache.keep([3, 1])
        assert self.written(cache, [[7, 8], [9, 10]]) == [[1, 2, 3, 7, 8], [4, 9, 10, 0, 0]]
        cache.keep([0, 2])
        assert self.written(cache, [[11], [12]]) == [[1, 2, 3, 11], [4, 9, 10, 12]]
        assert cache.lengths == [3, 3]

    def test_what_is_not_kept_is_gone(self) -> None:
        cache = RaggedCache(1, capacity=4)
        self.written(cache, [[1, 2]])
        cache.crop(-2)
        assert self.written(cache, [[3]]) == [[3]]

    def test_it_grows(self) -> None:
        cache = RaggedCache(2, capacity=2)
        self.written(cache, [[1, 2], [3, 4]])
        cache.keep([2, 1])
        assert self.written(cache, [[5, 6], [7, 8]]) == [[1, 2, 5, 6], [3, 7, 8, 0]]

    def test_rows_can_be_left_out(self) -> None:
        cache = RaggedCache(3, capacity=4)
        self.written(cache, [[1], [2], [3]])
        cache.keep([1, 1, 1])
        cache.select([2, 0])
        assert self.written(cache, [[5], [6]]) == [[3, 5], [1, 6]]
