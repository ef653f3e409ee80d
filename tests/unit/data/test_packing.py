"""Packing: which token lands where, and where windows may start."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ptp_lightning.data.batch import PackedBatch
from ptp_lightning.data.packing import TokenizedDocument, collate, draw_window_starts, pack

PAD = 99


def plain(documents: list[list[int]]) -> list[TokenizedDocument]:
    return [TokenizedDocument(document) for document in documents]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestPack:
    def test_five_documents(self) -> None:
        documents = [[11, 12, 13], [21, 22, 23, 24, 25, 26], [31], [41, 42], [51, 52, 53, 54]]

        rows = list(pack(plain(documents), row_length=6, pad_id=PAD))

        assert [row.input_ids.tolist() for row in rows] == [
            [11, 12, 13, 21, 22, 23],
            [24, 25, 26, 41, 42, PAD],  # 31 is a document without context; one place is too small for 51
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
        token = iter(range(1000))  # every token of the corpus is another number
        documents = [[next(token) for _ in range(length)] for length in lengths]

        rows = list(pack(plain(documents), row_length, pad_id=-7))

        packed: list[int] = []
        for place, row in enumerate(rows):
            ids, document_ids, positions, completion = (field.tolist() for field in row)
            assert len(ids) == len(document_ids) == len(positions) == row_length
            real = [token for token, document in zip(ids, document_ids, strict=True) if document >= 0]
            padding = row_length - len(real)
            assert completion == [True] * len(real) + [False] * padding
            assert ids[len(real) :] == [-7] * padding and document_ids[len(real) :] == [-1] * padding
            assert padding <= 1 or place == len(rows) - 1
            pieces = [len(list(group)) for _, group in groupby(document_ids[: len(real)])]
            assert min(pieces) >= 2
            assert document_ids[: len(real)] == [number for number, size in enumerate(pieces) for _ in range(size)]
            assert positions[: len(real)] == [position for size in pieces for position in range(size)]
            packed += real
        assert packed == sorted(set(packed))  # in order, none twice
        lost = set(range(sum(lengths))) - set(packed)
        last_tokens = {document[-1] for document in documents if document}
        assert lost <= last_tokens  # only a piece of a single token is dropped, and that is a document's last

    def test_masks_are_cut_with_their_documents(self) -> None:
        prompted = TokenizedDocument([11, 12, 13, 14, 15], [False, False, True, False, True])
        rows = list(pack([prompted, TokenizedDocument([21, 22, 23])], row_length=3))
        assert [row.input_ids.tolist() for row in rows] == [[11, 12, 13], [14, 15, 0], [21, 22, 23]]
        assert [row.completion_mask.tolist() for row in rows] == [
            [False, False, True],
            [False, True, False],
            [True, True, True],
        ]
        assert [row.eligible.tolist() for row in rows] == [
            [False, False, True],
            [False, True, False],
            [False, True, True],
        ]

    @given(st.lists(st.lists(st.booleans(), max_size=9), max_size=9), st.integers(2, 7))
    def test_every_token_keeps_its_mask(self, masks: list[list[bool]], row_length: int) -> None:
        token = iter(range(1000))
        documents = [TokenizedDocument([next(token) for _ in mask], mask) for mask in masks]
        expected = {
            token: learned
            for document in documents
            for token, learned in zip(document.token_ids, document.completion or [], strict=True)
        }
        for row in pack(documents, row_length):
            real = row.document_ids >= 0
            for token_id, learned in zip(row.input_ids[real].tolist(), row.completion_mask[real].tolist(), strict=True):
                assert learned == expected[token_id]

    @pytest.mark.parametrize("documents", [[], [[]], [[5], [6]]])
    def test_nothing_to_pack(self, documents: list[list[int]]) -> None:
        assert list(pack(plain(documents), row_length=4)) == []

    def test_refuses_rows_without_room_for_a_window(self) -> None:
        with pytest.raises(ValueError, match="data.row_length"):
            next(pack(plain([[1, 2]]), row_length=1))


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

    def test_refuses_a_row_without_eligible_tokens(self) -> None:
        with pytest.raises(ValueError, match="data.corpus"):
            draw_window_starts(torch.tensor([[True], [False]]), 1, generator())


class TestCollate:
    def batch(self) -> PackedBatch:
        rows = list(pack(plain([[11, 12, 13], [21, 22, 23, 24]]), row_length=5, pad_id=PAD))
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
