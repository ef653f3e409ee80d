"""Packing: documents to rows of equal length, rows to batches with windows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.batch import PADDING_DOCUMENT, PackedBatch

MIN_PIECE_TOKENS = 2  # in a shorter piece no token has context before it, so no window can start


@dataclass(frozen=True)
class TokenDocument:
    """A tokenised document, and which of its tokens contribute to the loss.

    Args:
        token_ids: of the document.
        completion_mask: true for completion tokens, which are learned; false for prompt tokens.

    >>> TokenDocument([7, 8, 9], [False, True, True]).piece(1, 3)
    TokenDocument(token_ids=[8, 9], completion_mask=[True, True])
    """

    token_ids: Sequence[int]
    completion_mask: Sequence[bool]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.completion_mask):
            raise ValueError(
                f"expected a completion_mask of {len(self.token_ids)} tokens, found {len(self.completion_mask)}"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_learned(self) -> bool:
        """Whether there is a completion token with context before it.

        >>> TokenDocument([7, 8, 9], [True, False, False]).is_learned
        False
        """
        return any(self.completion_mask[1:])

    def piece(self, begin: int, end: int) -> "TokenDocument":
        """Tokens `begin` to `end - 1`."""
        return TokenDocument(self.token_ids[begin:end], self.completion_mask[begin:end])


class PackedRow(NamedTuple):
    """One row of a `PackedBatch` without its windows; every field is `[S]`."""

    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    completion_mask: Tensor

    @property
    def eligible(self) -> Tensor:
        """`[S]` bool: completion tokens with context before them, at which a window may start."""
        return self.completion_mask & (self.position_ids >= 1)


def pack(
    documents: Iterable[Sequence[int] | TokenDocument], row_length: int, pad_id: int = 0, *, allow_split: bool = True
) -> Iterator[PackedRow]:
    """Concatenate documents into rows of `row_length` tokens.

    A document that does not fit is split at the end of the row. The remainder becomes a document of its own in the
    next row, with positions from 0. Pieces of fewer than two tokens are dropped, because no window fits into them. So
    a row is padded only if it has room for a single token, or if it is the last row.

    Args:
        documents: in the order of the rows; all tokens of a plain sequence are completion tokens.
        row_length: S.
        pad_id: token id of padding.
        allow_split: if false, a document that does not fit starts the next row, and the current row is padded.

    Raises:
        ValueError: `row_length` is smaller than two tokens, or a document is longer than a row and must not be split.

    >>> [row.document_ids.tolist() for row in pack([[5, 6, 7], [8, 9, 10]], row_length=4)]
    [[0, 0, 0, -1], [0, 0, 0, -1]]
    >>> [row.position_ids.tolist() for row in pack([[5, 6], [7, 8, 9, 10]], row_length=4)]
    [[0, 1, 0, 1], [0, 1, 0, 1]]
    """
    if row_length < MIN_PIECE_TOKENS:
        raise ValueError(
            f"expected rows of at least {MIN_PIECE_TOKENS} tokens, found {row_length}: raise data.row_length"
        )
    pieces: list[TokenDocument] = []
    room = row_length
    for given in documents:
        document = given if isinstance(given, TokenDocument) else TokenDocument(given, [True] * len(given))
        if not allow_split and len(document) > room:
            if len(document) > row_length:
                raise ValueError(
                    f"expected documents of at most {row_length} tokens, found one of {len(document)}: raise "
                    "data.row_length"
                )
            yield _row(pieces, row_length, pad_id)
            pieces, room = [], row_length
        begin = 0
        while len(document) - begin >= MIN_PIECE_TOKENS:
            piece = document.piece(begin, begin + room)
            pieces.append(piece)
            begin += len(piece)
            room -= len(piece)
            if room < MIN_PIECE_TOKENS:
                yield _row(pieces, row_length, pad_id)
                pieces, room = [], row_length
    if pieces:
        yield _row(pieces, row_length, pad_id)


def _row(pieces: list[TokenDocument], row_length: int, pad_id: int) -> PackedRow:
    """Concatenate pieces into one padded row."""
    lengths = [len(piece) for piece in pieces]
    padding = row_length - sum(lengths)
    document_ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return PackedRow(
        torch.tensor([token for piece in pieces for token in piece.token_ids] + [pad_id] * padding),
        torch.tensor(document_ids + [PADDING_DOCUMENT] * padding),
        torch.tensor([position for length in [*lengths, padding] for position in range(length)]),
        torch.tensor([entry for piece in pieces for entry in piece.completion_mask] + [False] * padding),
    )


def draw_window_starts(eligible: Tensor, num_windows: int, generator: torch.Generator) -> Tensor:
    """Draw the start positions of windows.

    Args:
        eligible: `[B, S]` bool, tokens at which a window may start.
        num_windows: N, windows per row.
        generator: source of randomness.

    Returns:
        `[B, N]` int64, ascending row indices, uniform over the eligible tokens; distinct if a row has N of them.

    Raises:
        ValueError: a row has no eligible token.

    >>> eligible = torch.tensor([[False, True, False, True]])
    >>> draw_window_starts(eligible, num_windows=2, generator=torch.Generator())
    tensor([[1, 3]])
    """
    if not bool(eligible.any(dim=1).all()):
        raise ValueError(
            "expected in every row at least one completion token with context before it, found a row without: the "
            "corpus has no document of two or more tokens, or a completion_mask is empty; set data.corpus"
        )
    keys = torch.rand(eligible.shape, generator=generator).masked_fill(~eligible, 2.0)
    order = keys.argsort(dim=1)
    # A row with fewer eligible tokens than windows uses them repeatedly.
    rank = torch.arange(num_windows) % eligible.sum(dim=1, keepdim=True)
    return order.gather(1, rank).sort(dim=1).values


def collate(rows: Sequence[PackedRow], num_windows: int, generator: torch.Generator) -> PackedBatch:
    """Stack rows into a batch and draw N windows per row, see `PackedRow.eligible`."""
    input_ids, document_ids, position_ids, completion_mask = (torch.stack(part) for part in zip(*rows, strict=True))
    starts = draw_window_starts(completion_mask & (position_ids >= 1), num_windows, generator)
    return PackedBatch(input_ids, document_ids, position_ids, starts, completion_mask)
