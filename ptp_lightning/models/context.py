"""Context: what the base model has read of a batch, and where the windows' slots stand behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from ptp_lightning.models.window_attention import slot_mask
from ptp_lightning.sampling import Sampler

if TYPE_CHECKING:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer


class Context(NamedTuple):
    """A batch of contexts after their forward pass.

    Attributes:
        hidden: `[B, S, H]`, last hidden states of the base model.
        cache: keys and values of the context; calls may append to it, and must cut off what they appended. Where they
            carry gradients (see `encode`), calls without gradients must work on `detached`.
        input_ids: `[B, S]`.
        document_ids: `[B, S]`.
        position_ids: `[B, S]`.
        window_starts: `[B, N]`.
        window_positions: `[B, N]`, position id of each window's first token.
        sampling: what the windows' tokens are picked from, and slots are told.
    """

    hidden: Tensor
    cache: DynamicCache
    input_ids: Tensor
    document_ids: Tensor
    position_ids: Tensor
    window_starts: Tensor
    window_positions: Tensor
    sampling: Sampler

    def detached(self) -> Context:
        """The same without gradients, with tensors of its own in the cache: calls leave this one's graph alone."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, layer in enumerate(cast("list[DynamicLayer]", self.cache.layers)):
            assert layer.keys is not None and layer.values is not None, "the context has been read"
            cache.update(layer.keys.detach(), layer.values.detach(), index)
        return self._replace(hidden=self.hidden.detach(), cache=cache)

    @property
    def first_hidden(self) -> Tensor:
        """`[B, N, H]`, hidden states that predict each window's first token."""
        return _gather(self.hidden, self.window_starts - 1)

    def place_slots(self, slots: int) -> tuple[Tensor, Tensor]:
        """J slots in each window, window after window.

        Returns:
            Attention mask `[B, 1, N * J, S + N * J]` and position ids `[B, N * J]`.
        """
        num_windows, device = self.window_starts.shape[1], self.window_starts.device
        window = torch.arange(num_windows, device=device).repeat_interleave(slots)
        offset = torch.arange(slots, device=device).repeat(num_windows)
        mask = slot_mask(
            self.document_ids,
            self.window_starts,
            query_window=window,
            query_offset=offset,
            key_window=window,
            key_offset=offset,
        )
        return mask, self.window_positions[:, window] + offset

    def place_next(self, offset: int) -> tuple[Tensor, Tensor]:
        """One more place in each window, after `offset` places that were read in as many calls and stay in the cache.

        Returns:
            Attention mask `[B, 1, N, S + N * (offset + 1)]` and position ids `[B, N]`.
        """
        num_windows, device = self.window_starts.shape[1], self.window_starts.device
        window = torch.arange(num_windows, device=device)
        mask = slot_mask(
            self.document_ids,
            self.window_starts,
            query_window=window,
            query_offset=torch.full_like(window, offset),
            key_window=window.repeat(offset + 1),
            key_offset=torch.arange(offset + 1, device=device).repeat_interleave(num_windows),
        )
        return mask, self.window_positions + offset


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """`[B, S, H]` at row indices `[B, N]`: `[B, N, H]`."""
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
