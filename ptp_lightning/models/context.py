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
        entry_hidden: `[B, S, H]`, what the layer reads at which slots enter; None if that is the first one.
    """

    batch: PackedBatch
    hidden: Tensor
    cache: DynamicCache
    sampling: Sampler
    end_of_text: int | None = None
    entry_hidden: Tensor | None = None

    @property
    def first_hidden(self) -> Tensor:
        """`[B, N, H]`, hidden states that predict each window's first token."""
        return self.before_windows(self.hidden)

    def before_windows(self, states: Tensor) -> Tensor:
        """Those of the token before each window: `[B, S, H]` to `[B, N, H]`."""
        index = (self.batch.window_starts - 1).unsqueeze(-1)
        return states.gather(1, index.expand(-1, -1, states.shape[-1]))
