"""What the layers of a `JoinedDecoder` share within a call: positions, attention, and how keys and values are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp_lightning.decoding.ragged_cache import RaggedCache
from ptp_lightning.decoding.token_tree import TokenTree, depth_first
from ptp_lightning.models.attention.aligned_blocks import AlignedBlocks, TokenRun

TABLE_ROWS = 64  # positions of the rotary table that are computed at a time


class Call(Protocol):
    """What all layers of a call share.

    Attributes:
        num_token_rows: rows of tokens; rows of slots follow them.
        is_whole: whether results may depend on the number of rows.
        cos: `[M, 1, D]`, see `Rotations`.
        sin: likewise.
    """

    num_token_rows: int
    is_whole: bool
    cos: Tensor
    sin: Tensor

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of layer `index`: `[M, heads, D]` to `[M, heads * D]`."""
        ...


class PromptCall(Call):
    """The beginning of one text."""

    is_whole = True

    def __init__(self, tokens: Tensor, row: int, cache: RaggedCache, rotations: Rotations) -> None:
        self.num_token_rows = len(tokens)
        self.cos, self.sin = rotations.at(torch.arange(len(tokens)))
        self._row = row
        self._cache = cache

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Call.attend`."""
        queries, keys, values = (states.transpose(0, 1) for states in (query, key, value))
        self._cache.write_run(keys, values, index, self._row, start=0)
        attended = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1).flatten(1)


class DecodingCall(Call):
    """Tokens, slots, or both of several texts."""

    is_whole = False

    def __init__(
        self,
        tokens: Tensor,
        slots: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        cache: RaggedCache,
        rotations: Rotations,
        num_groups: int,
    ) -> None:
        self.num_texts, self.num_tokens = tokens.shape[:2]
        self.num_slots = slots.shape[1]
        self.num_token_rows = self.num_texts * self.num_tokens
        self.cache = cache
        positions = position_ids[:, : self.num_tokens].flatten(), position_ids[:, self.num_tokens :].flatten()
        self.cos, self.sin = rotations.at(torch.cat(positions))
        self._blocks: AlignedBlocks | None = None
        if self.num_tokens:
            runs = [TokenRun(row, length, range(self.num_tokens)) for row, length in enumerate(cache.lengths)]
            self._blocks = AlignedBlocks(runs, self.num_tokens, num_groups, tokens.dtype)
        sees = mask[:, :, self.num_tokens :]
        slot_mask = torch.zeros(sees.shape, dtype=tokens.dtype).masked_fill_(~sees, -torch.inf)
        self._slot_mask = slot_mask.repeat_interleave(num_groups, dim=2)

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Call.attend`."""
        keys, values = self.cache.write(self._by_text(key), self._by_text(value), index)
        attended: list[Tensor] = []
        if self._blocks is not None:
            attended.append(self._blocks.attend(query[: self.num_token_rows], keys, values, scale))
        if self.num_slots:
            attended.append(self._attend_slots(query[self.num_token_rows :], keys, values, scale))
        return (attended[0] if len(attended) == 1 else torch.cat(attended)).flatten(1)

    def _attend_slots(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        num_heads, end = keys.shape[1], self._slot_mask.shape[-1]
        grouped = query.view(self.num_texts, self.num_slots, num_heads, -1, query.shape[2])
        attended = F.scaled_dot_product_attention(
            grouped.transpose(1, 2).flatten(2, 3), keys[:, :, :end], values[:, :, :end], self._slot_mask, scale=scale
        )
        return attended.unflatten(2, (self.num_slots, -1)).transpose(1, 2).reshape(query.shape)

    def _by_text(self, rows: Tensor) -> Tensor:
        """Rows of tokens and slots `[M, heads, D]` as `[B, heads, T + S, D]`."""
        if self.num_texts == 1:
            return rows.transpose(0, 1).unsqueeze(0)
        parts = rows.split([self.num_token_rows, self.num_texts * self.num_slots])
        return torch.cat([part.unflatten(0, (self.num_texts, -1)) for part in parts], dim=1).transpose(1, 2)


class TreeCall(Call):
    """Trees of tokens of several texts.

    Each run of a depth-first walk is written over the columns of the one before, from where it branches off. So a token
    sees the keys of its path, in the columns of their positions, as if this path was the only one.
    """

    is_whole = False

    def __init__(
        self,
        tokens: Tensor,
        tree: TokenTree,
        position_ids: Tensor,
        cache: RaggedCache,
        rotations: Rotations,
        num_groups: int,
    ) -> None:
        self.num_tokens = tokens.shape[1]
        self.num_token_rows = tokens.shape[0] * tokens.shape[1]
        self.cos, self.sin = rotations.at(position_ids.flatten())
        self._cache = cache
        runs = depth_first(tree, cache.lengths)
        self._blocks = AlignedBlocks(runs, self.num_tokens, num_groups, tokens.dtype)
        self._written = [
            (run.row, slice(run.start, run.start + len(run.columns)), self._rows(run.row, run.columns)) for run in runs
        ]
        self._end = max(cache.lengths) + self.num_tokens
        self._states: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, `[B * T, heads, D]`

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Call.attend`."""
        self._states.append((key, value))
        keys, values = self._cache.reserve(index, self._end)

        def write(run: int) -> None:
            row, columns, chosen = self._written[run]
            keys[row, :, columns] = key.index_select(0, chosen).transpose(0, 1)
            values[row, :, columns] = value.index_select(0, chosen).transpose(0, 1)

        return self._blocks.attend(query, keys, values, scale, write).flatten(1)

    def write_path(self, columns: Sequence[Sequence[int]]) -> None:
        """See `JoinedDecoder.write_path`."""
        for row, (length, path) in enumerate(zip(self._cache.lengths, columns, strict=True)):
            chosen = self._rows(row, path)
            for index, states in enumerate(self._states):
                keys, values = (part.index_select(0, chosen).transpose(0, 1) for part in states)
                self._cache.write_run(keys, values, index, row, length)

    def _rows(self, row: int, columns: Sequence[int]) -> Tensor:
        return torch.tensor(columns) + row * self.num_tokens


class Rotations:
    """Tables of the rotations of a model's queries and keys, by position.

    Args:
        rotary: the model's module, of a type in `STATIC_ROTATIONS`.
        dtype: of queries and keys.
    """

    def __init__(self, rotary: nn.Module, dtype: torch.dtype) -> None:
        self._rotary = rotary
        self._dtype = dtype
        self._tables: list[tuple[Tensor, Tensor]] = []

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[M, 1, D]` of positions `[M]`; sines have the sign with which `_rotate` multiplies."""
        while len(self._tables) * TABLE_ROWS <= int(positions.max()):
            begin = len(self._tables) * TABLE_ROWS
            rows = torch.arange(begin, begin + TABLE_ROWS).unsqueeze(0)
            cos, sin = self._rotary(torch.empty(0, dtype=self._dtype), position_ids=rows)
            first, second = sin[0].chunk(2, dim=-1)
            self._tables.append((cos[0], torch.cat([-first, second], dim=-1)))
        cos, sin = (torch.cat(tables) for tables in zip(*self._tables, strict=True))
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
