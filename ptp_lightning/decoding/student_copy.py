"""StudentCopy: a student that is a copy of the base model, and the tokens that it has read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ptp_lightning.decoding.lookahead import Lookahead, positions_and_mask
from ptp_lightning.decoding.ragged_cache import RaggedCache
from ptp_lightning.models.network import PredictorNetwork


class StudentCopy:
    """A student's copy of the base model and the tokens it has read. It reads when slots are asked for.

    Args:
        predictor: its student is a copy.
        num_rows: B.
        capacity: see `RaggedCache`.
    """

    def __init__(self, predictor: PredictorNetwork, num_rows: int, capacity: int) -> None:
        self._predictor = predictor
        self._cache = RaggedCache(num_rows, capacity)
        self._unread: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self._has_read = False  # the tokens of the base model's latest call

    def look_ahead(self, token_ids: Tensor, lookahead: Lookahead, slots: Tensor) -> Tensor:
        """One call that reads the unread tokens, then the tokens of the base model's call, then slots.

        Args:
            token_ids: `[B, T]`, of the base model's call.
            lookahead: of S slots after them.
            slots: `[B, S, H]`, input embeddings.

        Returns:
            Last hidden states of the slots `[B, S, H]`, for `slot_logits`.
        """
        unread = [sum(map(len, parts)) for parts in self._unread]
        rows = [torch.cat([*parts, row]) for parts, row in zip(self._unread, token_ids, strict=True)]
        tokens = self._predictor.student_embed(pad_sequence(rows, batch_first=True))
        shift = torch.tensor(unread, device=token_ids.device).unsqueeze(1)
        anchors = torch.where(lookahead.anchors < 0, -1, lookahead.anchors + shift)
        lookahead, limit = lookahead._replace(anchors=anchors), self._predictor.max_positions
        position_ids, mask = positions_and_mask(self._cache.lengths, tokens.shape[1], lookahead, tokens.device, limit)
        embeddings = torch.cat([tokens, slots.to(tokens.dtype)], dim=1)
        hidden = self._predictor.run_student_decoder(embeddings, position_ids, mask, self._cache)
        self._cache.keep(unread)
        self._unread = [[] for _ in unread]
        self._has_read = True
        return hidden[:, tokens.shape[1] :]

    def keep(self, token_ids: Tensor, counts: Sequence[int]) -> None:
        """See `BatchContext.keep`. Tokens that this copy has not read yet are read by its next call."""
        if self._has_read:
            self._cache.keep(counts)
        else:
            for parts, row, count in zip(self._unread, token_ids, counts, strict=True):
                parts.append(row[:count])
        self._has_read = False

    def select(self, rows: Sequence[int]) -> None:
        """See `BatchContext.select`."""
        self._cache.select(rows)
        self._unread = [self._unread[row] for row in rows]
