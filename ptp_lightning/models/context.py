"""Context: a batch that the base model has read; windows of tokens follow it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.sampling import Sampler

if TYPE_CHECKING:
    from transformers import DynamicCache


class Context(NamedTuple):
    """A batch after its forward pass, with the settings under which its windows are sampled.

    Attributes:
        batch: the rows and the starts of the windows.
        hidden: `[B, S, H]`, last hidden states of the base model.
        cache: keys and values of the context; reading windows does not change it.
        sampling: the windows' tokens are picked with these settings, and slots are conditioned on them.
        end_of_text: the token id that ends a sampled text; None if there is none.
    """

    batch: PackedBatch
    hidden: Tensor
    cache: DynamicCache
    sampling: Sampler
    end_of_text: int | None = None

    @property
    def first_hidden(self) -> Tensor:
        """`[B, N, H]`, hidden states that predict each window's first token."""
        index = (self.batch.window_starts - 1).unsqueeze(-1)
        return self.hidden.gather(1, index.expand(-1, -1, self.hidden.shape[-1]))
