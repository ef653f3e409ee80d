"""Documents to packed rows, rows to windows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.batch import PADDING_DOCUMENT, PackedBatch

# A shorter piece has no token with a context before it, so no window can start in it.
MIN_PIECE = 2


@dataclass(frozen=True)
class TokenDocument:
    """The tokens of a document of which not all are to be learned.

    Args:
        token_ids: of the document.
        completion_mask: true where a token is text to be learned rather than a prompt.
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

    def piece(self, begin: int, end: int) -> "TokenDocument":
        """The tokens from `begin` on, before `end`."""
        return TokenDocument(self.token_ids[begin:end], self.completion_mask[begin:end])


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


def pack(
    documents: Iterable[Sequence[int] | TokenDocument], row_length: int, pad_id: int = 0, *, cut: bool = True
) -> Iterator[PackedRow]:
    """Lay token sequences end to end into rows of `row_length` tokens; all tokens of a plain one are completion.

    A document that does not fit is cut at the end of the row; the rest goes on in the next row as a document of its
    own, with positions from 0. Pieces shorter than two tokens are dropped: they can hold no window. So padding stands
    only where a row has room for a single token, and at the end of the last row.

    Args:
        documents: of the rows, in their order.
        row_length: S.
        pad_id: stands on padding.
        cut: false keeps documents whole: one that does not fit begins the next row, and padding stands before it.

    Raises:
        ValueError: `row_length` is smaller than two tokens, or than a document that is not to be cut.
    """
    if row_length < MIN_PIECE:
        raise ValueError(f"expected rows of at least {MIN_PIECE} tokens, found {row_length}: raise data.row_length")
    pieces: list[TokenDocument] = []
    room = row_length
    for given in documents:
        document = given if isinstance(given, TokenDocument) else TokenDocument(given, [True] * len(given))
        if not cut and len(document) > room:
            if len(document) > row_length:
                raise ValueError(
                    f"expected documents of at most {row_length} tokens, found one of {len(document)}: raise "
                    "data.row_length"
                )
            yield _row(pieces, row_length, pad_id)
            pieces, room = [], row_length
        begin = 0
        while len(document) - begin >= MIN_PIECE:
            piece = document.piece(begin, begin + room)
            pieces.append(piece)
            begin += len(piece)
            room -= len(piece)
            if room < MIN_PIECE:
                yield _row(pieces, row_length, pad_id)
                pieces, room = [], row_length
    if pieces:
        yield _row(pieces, row_length, pad_id)


def _row(pieces: list[TokenDocument], row_length: int, pad_id: int) -> PackedRow:
    """Join pieces into one row and fill it up with padding."""
    lengths = [len(piece) for piece in pieces]
    padding = row_length - sum(lengths)
    document_ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return PackedRow(
        torch.tensor([token for piece in pieces for token in piece.token_ids] + [pad_id] * padding),
        torch.tensor(document_ids + [PADDING_DOCUMENT] * padding),
        torch.tensor([position for length in [*lengths, padding] for position in range(length)]),
        torch.tensor([learned for piece in pieces for learned in piece.completion_mask] + [False] * padding),
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
            "no document of two or more tokens, or a completion_mask is empty; set data.corpus"
        )
    keys = torch.rand(eligible.shape, generator=generator).masked_fill(~eligible, 2.0)
    order = keys.argsort(dim=1)
    # With fewer eligible tokens than windows, go round them again.
    rank = torch.arange(num_windows) % eligible.sum(dim=1, keepdim=True)
    return order.gather(1, rank).sort(dim=1).values


def collate(rows: Sequence[PackedRow], num_windows: int, generator: torch.Generator) -> PackedBatch:
    """Stack rows into a batch and draw N windows a row, which start on completion tokens with a context."""
    input_ids, document_ids, position_ids, completion_mask = (torch.stack(part) for part in zip(*rows, strict=True))
    starts = draw_window_starts(completion_mask & (position_ids >= 1), num_windows, generator)
    return PackedBatch(input_ids, document_ids, position_ids, starts, completion_mask)
