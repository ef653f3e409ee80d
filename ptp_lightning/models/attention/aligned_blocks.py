"""Attention of tokens in aligned blocks of positions: exact, whatever else a call reads.

The order in which an attention kernel adds depends on the number of its queries and keys. Here both are functions of a
token's position alone: its query is computed together with those of the `BLOCK_SIZE` positions that share its block,
and sees the keys up to the end of the block. Positions of the block that the call does not read have zero queries.
So the same token always gets the same call of the same kernel, and the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_SIZE = 4
"""Larger blocks waste more in a call of few tokens, smaller ones need more calls of the kernel for a prompt."""


class TokenRun(NamedTuple):
    """Tokens of a call that follow each other in one row.

    Attributes:
        row: of the batch.
        start: number of tokens of the row before the first of them.
        columns: of the call; a row has T.
    """

    row: int
    start: int
    columns: Sequence[int]


class AlignedBlocks:
    """The blocks of the tokens that a call reads.

    Args:
        runs: of the B T tokens of the call, each of which is in one of them.
        num_tokens: T, tokens of each row in the call.
        num_groups: G, query heads that share a key-value head.
        dtype: of queries, keys and values.

    >>> blocks = AlignedBlocks([TokenRun(0, 5, range(4))], num_tokens=4, num_groups=1, dtype=torch.float32)
    >>> blocks.keys_end, blocks.index  # positions 5 to 8 are in the blocks 4 to 7 and 8 to 11
    ([(0, 8), (0, 12)], tensor([1, 2, 3, 4]))
    """

    def __init__(self, runs: Sequence[TokenRun], num_tokens: int, num_groups: int, dtype: torch.dtype) -> None:
        self.runs = runs
        self.keys_end: list[tuple[int, int]] = []  # run and number of keys of each block
        index: dict[int, int] = {}
        for number, (row, length, columns) in enumerate(runs):
            first = length // BLOCK_SIZE
            end = -(-(length + len(columns)) // BLOCK_SIZE)
            start = len(self.keys_end) * BLOCK_SIZE + length % BLOCK_SIZE
            index |= {row * num_tokens + column: start + k for k, column in enumerate(columns)}
            self.keys_end += [(number, (block + 1) * BLOCK_SIZE) for block in range(first, end)]
        self.index = torch.tensor([index[token] for token in range(len(index))])
        longest = max(keys for _, keys in self.keys_end)
        mask = torch.zeros(BLOCK_SIZE, longest, dtype=dtype)
        mask[:, -BLOCK_SIZE:] = torch.full((BLOCK_SIZE, BLOCK_SIZE), -torch.inf).triu(1)
        self._padded: Tensor | None = None
        self._mask = mask.repeat_interleave(num_groups, dim=0)[None, None]

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        write: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Attention of the tokens to their row, up to themselves.

        Args:
            query: `[B * T, heads, D]`.
            keys: `[B, key-value heads, capacity, D]`, those of the tokens included; finite where nothing was written.
                The capacity is a multiple of `BLOCK_SIZE`.
            values: likewise.
            scale: of the scores.
            write: is called with the number of each run, to write its keys and values over those of other runs.

        Returns:
            `[B * T, heads, D]`.
        """
        num_heads = keys.shape[1]
        # The query heads of a key-value head are further queries of it: one product instead of several.
        grouped = query.unflatten(1, (num_heads, -1)).transpose(0, 1)
        if self._padded is None:  # kept for the next layer, which overwrites the same rows
            self._padded = query.new_zeros(num_heads, len(self.keys_end) * BLOCK_SIZE, *grouped.shape[2:])
        blocks = (
            self._padded.index_copy_(1, self.index, grouped).flatten(1, 2).unsqueeze(0).chunk(len(self.keys_end), 2)
        )
        parts, latest = [], -1
        for block, (number, end) in zip(blocks, self.keys_end, strict=True):
            if write is not None and number != latest:
                write(number)
            latest, row = number, self.runs[number].row
            of_row = slice(row, row + 1)
            parts.append(
                F.scaled_dot_product_attention(
                    block, keys[of_row, :, :end], values[of_row, :, :end], self._mask[..., -end:], scale=scale
                )
            )
        attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        attended = attended.squeeze(0).unflatten(1, (-1, grouped.shape[2])).index_select(1, self.index)
        return attended.transpose(0, 1).reshape(query.shape)
