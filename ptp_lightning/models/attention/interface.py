"""The interface of attention back-ends: what reads windows, and what it needs from the layers that it runs.

A window attends to the context before it, in its own document, and to its own positions up to the one that asks. It
never attends to another window. `Dense`, `Blocks` and `Flex` compute this in three ways.

Tensor sizes: B rows, S context tokens, N windows of a row, J positions of each window that are read in a call, H the
hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from ptp_lightning.batch import PackedBatch

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PreTrainedModel


class WindowKeys(Protocol):
    """Keys and values that the windows of one call may see, in every layer.

    `attend_to_windows`, the attention function of the model, passes each layer's queries, keys and values on to it.
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of a layer.

        Args:
            layer: index of the layer.
            query: `[B, heads, T, D]`, of the T positions of this call.
            key: `[B, key-value heads, T, D]`.
            value: `[B, key-value heads, T, E]`.
            scale: of the scores.

        Returns:
            `[B, T, heads, E]`.
        """
        ...


class RunLayers(Protocol):
    """Runs decoder layers on input embeddings."""

    def __call__(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        *,
        window_keys: WindowKeys | None = None,
    ) -> Tensor:
        """Last hidden states `[B, T, H]`.

        Args:
            embeddings: `[B, T, H]`.
            position_ids: `[B, T]`.
            mask: `[B, 1, T, P + T]` bool, P cached keys; None with `window_keys`, which know what is visible.
            cache: gets the keys and values of these T positions appended.
            window_keys: of a call that reads windows.
        """
        ...


class IncrementalReader(Protocol):
    """Reads windows a few positions at a time; each call sees the positions of the calls before it."""

    def read(self, embeddings: Tensor) -> Tensor:
        """The next J positions of each window: `[B, N, J, H]` to last hidden states of the same shape."""
        ...


class WindowAttention(Protocol):
    """An attention back-end: one way to let windows attend."""

    name: ClassVar[str]

    def is_supported(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether windows of a model can attend this way.

        Args:
            model: the base model.
            device: of the layers.
            dtype: of queries, keys and values.
        """
        ...

    def read_windows(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache, embeddings: Tensor) -> Tensor:
        """Read the first J positions of each window in one call.

        Args:
            run: the layers.
            batch: the packed rows and the starts of their windows.
            cache: keys and values of the context; it is not changed.
            embeddings: `[B, N, J, H]`.

        Returns:
            Last hidden states `[B, N, J, H]`.
        """
        ...

    def incremental_reader(self, run: RunLayers, batch: PackedBatch, cache: DynamicCache) -> IncrementalReader:
        """A reader that begins at the windows' first positions; arguments as in `read_windows`."""
        ...

    def read_jointly(self, run: RunLayers, batch: PackedBatch, context: Tensor, embeddings: Tensor) -> Tensor:
        """Read the context and its windows in one call, so that gradients reach both.

        Args:
            run: the layers.
            batch: the packed rows and the starts of their windows.
            context: `[B, S, H]`, input embeddings of the context tokens.
            embeddings: `[B, N, J, H]`, of the first J positions of each window.

        Returns:
            Last hidden states of the windows, `[B, N, J, H]`.
        """
        ...


def window_position_ids(batch: PackedBatch, start: int, length: int) -> Tensor:
    """Position ids `[B, N * length]` of the positions `start`, `start + 1`, .. of each window.

    >>> ids = torch.tensor([[0, 1, 2, 0, 1]])
    >>> batch = PackedBatch(ids, torch.tensor([[0, 0, 0, 1, 1]]), ids, torch.tensor([[1, 4]]), ids >= 0)
    >>> window_position_ids(batch, 0, 3)
    tensor([[1, 2, 3, 1, 2, 3]])
    """
    offsets = start + torch.arange(length, device=batch.window_starts.device)
    return (batch.window_positions.unsqueeze(-1) + offsets).flatten(1)
