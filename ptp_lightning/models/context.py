"""Context: what the base model has read of a batch, and where the windows' slots stand behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ptp_lightning.models.attention.window_reader import WindowLayout
from ptp_lightning.sampling import Sampler

if TYPE_CHECKING:
    from transformers import DynamicCache


class Context(NamedTuple):
    """A batch of contexts after their forward pass.

    Attributes:
        hidden: `[B, S, H]`, last hidden states of the base model.
        cache: keys and values of the context; stays as it is (see `WindowReader`).
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

    @property
    def first_hidden(self) -> Tensor:
        """`[B, N, H]`, hidden states that predict each window's first token."""
        return _gather(self.hidden, self.window_starts - 1)

    @property
    def window_layout(self) -> WindowLayout:
        """Where the windows stand."""
        return WindowLayout(self.document_ids, self.window_starts, self.window_positions)


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """`[B, S, H]` at row indices `[B, N]`: `[B, N, H]`."""
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
