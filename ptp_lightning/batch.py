"""PackedBatch: the contract between data and models."""

from typing import NamedTuple

import torch
from torch import Tensor

PADDING_DOCUMENT = -1


class PackedBatch(NamedTuple):
    """Rows packed with whole or truncated documents, and the positions where windows start.

    A document never attends to another one, although they share a row. Documents are numbered from 0 within each row.

    Attributes:
        input_ids: `[B, S]` int64 token ids; any valid id on padding.
        document_ids: `[B, S]` int64, which document a token belongs to; -1 on padding.
        position_ids: `[B, S]` int64, counted from 0 within each document.
        window_starts: `[B, N]` int64, row index of the first token of each window; its position is >= 1, so that at
            least one token of context precedes it.
        completion_mask: `[B, S]` bool, true where a token is text to be learned rather than a prompt.

    A row with documents of three and two tokens, and a window after the first two tokens of the first document:

    >>> batch = PackedBatch(
    ...     input_ids=torch.tensor([[7, 8, 9, 7, 8]]),
    ...     document_ids=torch.tensor([[0, 0, 0, 1, 1]]),
    ...     position_ids=torch.tensor([[0, 1, 2, 0, 1]]),
    ...     window_starts=torch.tensor([[2]]),
    ...     completion_mask=torch.ones(1, 5, dtype=torch.bool),
    ... )
    >>> batch.num_windows, batch.window_positions
    (1, tensor([[2]]))
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

    @property
    def window_positions(self) -> Tensor:
        """`[B, N]` int64, position id of each window's first token, which may lie beyond the end of the row."""
        return self.position_ids.gather(1, self.window_starts - 1) + 1
