"""Packed rows with windows, written out by hand, and which of their slots may notice a change, for tests."""

import torch
from torch import Tensor

from ptp_lightning.batch import PackedBatch

# Two rows: documents of 6 and 7 tokens, padded; one document of 14 tokens. Windows overlap and leave their document.
DOCUMENT_IDS = torch.tensor([[0] * 6 + [1] * 7 + [-1], [0] * 14])
POSITION_IDS = torch.tensor([[*range(6), *range(7), 0], [*range(14)]])
WINDOW_STARTS = torch.tensor([[2, 5, 10], [1, 8, 9]])


def make_batch(input_ids: Tensor) -> PackedBatch:
    """These two rows with tokens `[2, 14]`."""
    return PackedBatch(input_ids, DOCUMENT_IDS, POSITION_IDS, WINDOW_STARTS, DOCUMENT_IDS >= 0)


def one_document(input_ids: Tensor, window_starts: Tensor) -> PackedBatch:
    """Rows `[B, S]` that hold a single document each, with windows that start at `[B, N]`."""
    zeros, positions = torch.zeros_like(input_ids), torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return PackedBatch(input_ids, zeros, positions, window_starts, zeros == 0)


Slots = set[tuple[int, int, int]]
"""(row, window, slot)"""


def slots_that_differ(left: Tensor, right: Tensor) -> Slots:
    """All slots of `[B, N, L - 1, ...]` with any other number."""
    return {(row, window, slot) for row, window, slot in (left != right).any(-1).nonzero().tolist()}


def slots_that_see(row: int, position: int, num_slots: int) -> Slots:
    """The slots whose context holds the token at a position: those of later windows in its document."""
    return {
        (row, window, slot)
        for window, start in enumerate(WINDOW_STARTS[row].tolist())
        for slot in range(num_slots)
        if position < start and DOCUMENT_IDS[row, position] == DOCUMENT_IDS[row, start - 1]
    }
