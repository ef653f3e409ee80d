"""Documents to packed rows, rows to windows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.data.batch import PADDING_DOCUMENT, PackedBatch

# A shorter piece has no token with a context before it, so no window can start in it.
MIN_PIECE = 2


class TokenizedDocument(NamedTuple):
    """A document as tokens.

    Attributes:
        token_ids: of the whole document.
        completion: for each token, whether it is text to be learned; None where all are.
    """

    token_ids: Sequence[int]
    completion: Sequence[bool] | None = None


class PackedRow(NamedTuple):
    """One row of a `PackedBatch` without its windows; every field is `[S]`."""

    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    completion_mask: Tensor

    @property
    def eligible(self) -> Tensor:
        """`[S]` bool, the tokens that may be the first of a window: to be learned, with a context before them."""
        return self.completion_mask & (self.position_ids >= 1)


def pack(documents: Iterable[TokenizedDocument], row_length: int, pad_id: int = 0) -> Iterator[PackedRow]:
    """Lay token sequences end to end into rows of `row_length` tokens.

    A document that does not fit is cut at the end of the row; the rest goes on in the next row as a document of its
    own, with positions from 0. Pieces shorter than two tokens are dropped: they can hold no window. So padding stands
    only where a row has room for a single token, and at the end of the last row.

    Raises:
        ValueError: `row_length` is smaller than two tokens.
    """
    if row_length < MIN_PIECE:
        raise ValueError(f"expected rows of at least {MIN_PIECE} tokens, found {row_length}: raise data.row_length")
    pieces: list[TokenizedDocument] = []
    room = row_length
    for token_ids, completion in documents:
        begin = 0
        while len(token_ids) - begin >= MIN_PIECE:
            place = slice(begin, begin + room)
            piece = TokenizedDocument(token_ids[place], None if completion is None else completion[place])
            pieces.append(piece)
            begin += len(piece.token_ids)
            room -= len(piece.token_ids)
            if room < MIN_PIECE:
                yield _row(pieces, row_length, pad_id)
                pieces, room = [], row_length
    if pieces:
        yield _row(pieces, row_length, pad_id)


def _row(pieces: list[TokenizedDocument], row_length: int, pad_id: int) -> PackedRow:
    """Join pieces into one row and fill it up with padding."""
    lengths = [len(piece.token_ids) for piece in pieces]
    padding = row_length - sum(lengths)
    token_ids = [token for piece in pieces for token in piece.token_ids] + [pad_id] * padding
    document_ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    positions = [position for length in [*lengths, padding] for position in range(length)]
    completion = [
        learned
        for piece, length in zip(pieces, lengths, strict=True)
        for learned in ([True] * length if piece.completion is None else piece.completion)
    ]
    return PackedRow(
        torch.tensor(token_ids),
        torch.tensor(document_ids + [PADDING_DOCUMENT] * padding),
        torch.tensor(positions),
        torch.tensor(completion + [False] * padding),
    )


def draw_window_starts(eligible: Tensor, num_windows: int, generator: torch.Generator) -> Tensor:
    """Choose where windows start.

    Args:
        eligible: `[B, S]` bool, the tokens that may be the first of a window.
        num_windows: N, windows per row.
        generator: source of the draws.

    Returns:
        `[B, N]` int64, ascending row indices, uniform over the eligible tokens; distinct while a row has N of them.

    Raises:
        ValueError: a row has no eligible token.
    """
    if not bool(eligible.any(dim=1).all()):
        raise ValueError(
            "expected at least one token with a context before it in every row, found a row without: the corpus holds "
            "no document of two or more tokens, or a completion_mask is empty; mend data.corpus"
        )
    keys = torch.rand(eligible.shape, generator=generator).masked_fill(~eligible, 2.0)
    order = keys.argsort(dim=1)
    # With fewer eligible tokens than windows, go round them again.
    rank = torch.arange(num_windows) % eligible.sum(dim=1, keepdim=True)
    return order.gather(1, rank).sort(dim=1).values


def collate(rows: Sequence[PackedRow], num_windows: int, generator: torch.Generator) -> PackedBatch:
    """Stack rows into a batch and draw N windows a row, which start at completion tokens with a context before them."""
    input_ids, document_ids, position_ids, completion_mask = (
        torch.stack(tensors) for tensors in zip(*rows, strict=True)
    )
    starts = draw_window_starts(completion_mask & (position_ids >= 1), num_windows, generator)
    return PackedBatch(input_ids, document_ids, position_ids, starts, completion_mask)
