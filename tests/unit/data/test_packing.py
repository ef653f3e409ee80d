"""Packing: rows of documents, and start positions of windows."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.packing import TokenDocument, collate, draw_window_starts, pack

PAD = 99


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestPack:
    def test_five_documents(self) -> None:
        documents = [[11, 12, 13], [21, 22, 23, 24, 25, 26], [31], [41, 42], [51, 52, 53, 54]]

        rows = list(pack(documents, row_length=6, pad_id=PAD))

        assert [row.input_ids.tolist() for row in rows] == [
            [11, 12, 13, 21, 22, 23],
            [24, 25, 26, 41, 42, PAD],  # 31 is a document without context; 51 does not fit into a single position
            [51, 52, 53, 54, PAD, PAD],
        ]
        assert [row.document_ids.tolist() for row in rows] == [
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 1, 1, -1],
            [0, 0, 0, 0, -1, -1],
        ]
        assert [row.position_ids.tolist() for row in rows] == [
            [0, 1, 2, 0, 1, 2],
            [0, 1, 2, 0, 1, 0],
            [0, 1, 2, 3, 0, 1],
        ]

    @given(
        lengths=st.lists(st.integers(0, 12), max_size=12),
        row_length=st.integers(2, 9),
    )
    def test_invariants(self, lengths: list[int], row_length: int) -> None:
        token = iter(range(1000))  # every token of the corpus is different
        documents = [[next(token) for _ in range(length)] for length in lengths]

        rows = list(pack(documents, row_length, pad_id=-7))

        packed: list[int] = []
        for index, row in enumerate(rows):
            ids, document_ids, positions, completion = (field.tolist() for field in row)
            assert len(ids) == len(document_ids) == len(positions) == row_length
            assert completion == [document >= 0 for document in document_ids]
            real = [token for token, document in zip(ids, document_ids, strict=True) if document >= 0]
            padding = row_length - len(real)
            assert ids[len(real) :] == [-7] * padding and document_ids[len(real) :] == [-1] * padding
            assert padding <= 1 or index == len(rows) - 1
            pieces = [len(list(group)) for _, group in groupby(document_ids[: len(real)])]
            assert min(pieces) >= 2
            assert document_ids[: len(real)] == [number for number, size in enumerate(pieces) for _ in range(size)]
            assert positions[: len(real)] == [position for size in pieces for position in range(size)]
            packed += real
        assert packed == sorted(set(packed))  # in order, none twice
        dropped = set(range(sum(lengths))) - set(packed)
        last_tokens = {document[-1] for document in documents if document}
        assert dropped <= last_tokens  # only a piece of a single token is dropped, and that is a document's last

    @pytest.mark.parametrize("documents", [[], [[]], [[5], [6]]])
    def test_nothing_to_pack(self, documents: list[list[int]]) -> None:
        assert list(pack(documents, row_length=4)) == []

    def test_rows_that_are_too_short_for_a_window_are_rejected(self) -> None:
        with pytest.raises(ValueError, match="data.row_length"):
            next(pack([[1, 2]], row_length=1))


class TestPackPromptsAndCompletions:
    """Prompts are tens, completions are not."""

    @staticmethod
    def document(*token_ids: int) -> TokenDocument:
        return TokenDocument(token_ids, [token % 10 != 0 for token in token_ids])

    def test_masks_are_packed_with_the_tokens(self) -> None:
        documents = [self.document(10, 11, 12), [50, 51], self.document(20, 20, 21)]
        rows = list(pack(documents, row_length=6, pad_id=PAD))
        assert [row.input_ids.tolist() for row in rows] == [[10, 11, 12, 50, 51, PAD], [20, 20, 21, PAD, PAD, PAD]]
        assert [row.completion_mask.tolist() for row in rows] == [
            [False, True, True, True, True, False],  # a plain document is all completion
            [False, False, True, False, False, False],
        ]

    def test_whole_documents(self) -> None:
        documents = [self.document(10, 11, 12), self.document(20, 21, 22, 23), self.document(30, 31)]
        rows = list(pack(documents, row_length=6, pad_id=PAD, allow_split=False))
        assert [row.input_ids.tolist() for row in rows] == [
            [10, 11, 12, PAD, PAD, PAD],
            [20, 21, 22, 23, 30, 31],
        ]
        assert rows[0].document_ids.tolist() == [0, 0, 0, -1, -1, -1]

    @given(lengths=st.lists(st.integers(2, 7), max_size=12), row_length=st.integers(7, 15))
    def test_whole_documents_stay_whole_and_in_order(self, lengths: list[int], row_length: int) -> None:
        documents = [self.document(10 * (index + 1), *[1] * (length - 1)) for index, length in enumerate(lengths)]
        found = [
            row.input_ids[row.document_ids == number].tolist()
            for row in pack(documents, row_length, allow_split=False)
            for number in range(int(row.document_ids.max()) + 1)
        ]
        assert found == [list(document.token_ids) for document in documents]

    def test_a_document_longer_than_a_row_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="at most 2 tokens, found one of 3: raise data.row_length"):
            list(pack([self.document(10, 11, 12)], row_length=2, allow_split=False))

    def test_a_mask_of_another_length_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="completion_mask of 2 tokens, found 1"):
            TokenDocument([1, 2], [True])

    def test_windows_start_on_completions_that_have_a_context(self) -> None:
        documents = [TokenDocument([1, 2, 3, 4], [True, True, False, True])]
        batch = collate(list(pack(documents, row_length=6)), num_windows=8, generator=generator())
        assert set(batch.window_starts.flatten().tolist()) == {1, 3}


class TestDrawWindowStarts:
    ELIGIBLE = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]).bool()

    @pytest.mark.parametrize("num_windows", [1, 2, 3, 5])
    def test_only_eligible_tokens_in_ascending_order(self, num_windows: int) -> None:
        for seed in range(20):
            starts = draw_window_starts(self.ELIGIBLE, num_windows, generator(seed))
            assert starts.shape == (2, num_windows)
            assert self.ELIGIBLE.gather(1, starts).all()
            assert torch.equal(starts, starts.sort(dim=1).values)

    def test_distinct_while_possible(self) -> None:
        assert draw_window_starts(self.ELIGIBLE, 3, generator())[0].tolist() == [1, 3, 4]
        for seed in range(20):
            starts = draw_window_starts(self.ELIGIBLE, 5, generator(seed))
            counts = torch.stack([row.bincount(minlength=6) for row in starts])
            spread = [int(row[row > 0].max() - row[row > 0].min()) for row in counts]
            assert spread == [1, 1]  # 5 windows on 3 and on 2 tokens: each is used before one is used again

    def test_uniform(self) -> None:
        rows = 6000
        starts = draw_window_starts(self.ELIGIBLE[:1].expand(rows, -1), 2, generator())
        counts = starts.flatten().bincount(minlength=6)
        expected, deviation = rows * 2 / 3, (rows * 2 / 3 * 1 / 3) ** 0.5
        assert (counts[[1, 3, 4]] - expected).abs().max() < 4 * deviation
        assert int(counts.sum()) == int(counts[[1, 3, 4]].sum())

    def test_same_generator_same_starts(self) -> None:
        first, second = (draw_window_starts(self.ELIGIBLE, 2, generator(3)) for _ in range(2))
        assert torch.equal(first, second)

    def test_a_row_without_eligible_tokens_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="data.corpus"):
            draw_window_starts(torch.tensor([[True], [False]]), 1, generator())


class TestCollate:
    def batch(self) -> PackedBatch:
        rows = list(pack([[11, 12, 13], [21, 22, 23, 24]], row_length=5, pad_id=PAD))
        return collate(rows, num_windows=4, generator=generator())

    def test_windows_start_on_real_tokens_with_a_context(self) -> None:
        batch = self.batch()

        def at_starts(tensor: Tensor) -> Tensor:
            return tensor.gather(1, batch.window_starts)

        assert batch.num_windows == 4
        assert (at_starts(batch.position_ids) >= 1).all()
        assert (at_starts(batch.document_ids) >= 0).all()
        # Rows: 11 12 13 | 21 22 and 23 24 + padding; 23 stands first in its piece.
        assert set(at_starts(batch.input_ids)[0].tolist()) == {12, 13, 22}
        assert set(at_starts(batch.input_ids)[1].tolist()) == {24}

    def test_every_real_token_is_completion(self) -> None:
        batch = self.batch()
        assert torch.equal(batch.completion_mask, batch.document_ids >= 0)
        assert not batch.completion_mask[1, 2:].any()

    def test_to_moves_every_field(self) -> None:
        moved = self.batch().to("meta")
        assert isinstance(moved, PackedBatch)
        assert [tensor.device.type for tensor in moved] == ["meta"] * 5
