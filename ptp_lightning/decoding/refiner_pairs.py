"""RefinerPairs: the pairs of the texts that a refiner has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptp_lightning.decoding.lookahead import Lookahead, positions_and_mask
from ptp_lightning.decoding.ragged_cache import RaggedCache
from ptp_lightning.models.correction.decoder_refiner import Refiner, RefinerContext
from ptp_lightning.models.network import PredictorNetwork


class _UnreadPairs(NamedTuple):
    """Last hidden states and token embeddings `[B, T, H]`, of which the first `counts[b]` of row b count."""

    hidden: Tensor
    embeddings: Tensor
    counts: list[int]


class RefinerPairs:
    """The pairs of the texts that the refiner has read. It reads when a draft is refined.

    Args:
        predictor: the network.
        refiner: its correction.
        num_rows: B.
        capacity: see `RaggedCache`.
    """

    def __init__(self, predictor: PredictorNetwork, refiner: Refiner, num_rows: int, capacity: int) -> None:
        self._predictor = predictor
        self._cache = RaggedCache(num_rows, capacity)
        self._context = RefinerContext(refiner, self._cache)
        self._unread: list[_UnreadPairs] = []

    def append(self, hidden: Tensor, embeddings: Tensor, counts: Sequence[int]) -> None:
        """Append the first `counts[b]` tokens of row b, given the last hidden states and embeddings `[B, T, H]`."""
        longest = max(counts)
        if longest:
            self._unread.append(_UnreadPairs(hidden[:, :longest], embeddings[:, :longest], list(counts)))

    def refine(self, hidden: Tensor, embeddings: Tensor, conditioning: Tensor | None) -> Tensor:
        """See `BatchContext.correct`."""
        if not self._unread:
            return self._context.refine(hidden, embeddings, *self._layout(hidden.shape[1]), conditioning)
        *earlier, latest = self._unread
        self._unread = []
        for unread in earlier:
            self._context.read(unread.hidden, unread.embeddings, *self._layout(unread.hidden.shape[1]))
            self._cache.keep(unread.counts)
        # The latest pairs are read in the same pass as the slots.
        num_tokens, num_slots = latest.hidden.shape[1], hidden.shape[1]
        refined = self._context.refine(
            torch.cat([latest.hidden, hidden], dim=1),
            torch.cat([latest.embeddings, embeddings], dim=1),
            *self._layout(num_tokens, Lookahead.single(latest.counts, num_slots, hidden.device)),
            None if conditioning is None else pad(conditioning.expand(num_slots, -1), (0, 0, num_tokens, 0)),
        )
        self._cache.keep(latest.counts)
        return refined[:, num_tokens:]

    def select(self, rows: Sequence[int]) -> None:
        """See `BatchContext.select`."""
        self._cache.select(rows)
        self._unread = [
            _UnreadPairs(hidden[list(rows)], embeddings[list(rows)], [counts[row] for row in rows])
            for hidden, embeddings, counts in self._unread
        ]

    def _layout(self, num_tokens: int, lookahead: Lookahead | None = None) -> tuple[Tensor, Tensor]:
        lengths, device = self._cache.lengths, self._predictor.base_model.device
        return positions_and_mask(lengths, num_tokens, lookahead, device, self._predictor.max_positions)
