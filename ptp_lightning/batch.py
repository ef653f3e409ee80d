"""PackedBatch: the one contract between data and model."""

from typing import NamedTuple

import torch
from torch import Tensor

PADDING_DOCUMENT = -1


class PackedBatch(NamedTuple):
    """Rows packed with whole or cut documents, and the places where windows start.

    A document never sees another one, although they share a row. Documents are numbered from 0 within each row.

    Attributes:
        input_ids: `[B, S]` int64 token ids; any valid id on padding.
        document_ids: `[B, S]` int64, which document a token belongs to; -1 on padding.
        position_ids: `[B, S]` int64, counted from 0 within each document.
        window_starts: `[B, N]` int64, row index of the first token of each window; its position is >= 1, so that at
            least one token of context stands before it.
        completion_mask: `[B, S]` bool, true where a token is text to be learned rather than a prompt.
    """

    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    window_starts: Tensor
    completion_mask: Tensor

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        return PackedBatch(*(tensor.to(device) for tensor in self))

    @property
    def num_windows(self) -> int:
        """N, windows per row."""
        return self.window_starts.shape[1]
