"""NgramTable: continuations that are stored with a predictor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptp_lightning.ngrams import Continuations, Ngrams


class NgramTable(nn.Module):
    """Buffers for N continuations, and a map of them that is made when it is first read.

    Args:
        size: N.

    Attributes:
        token_ids: see `Ngrams`. This and the next are empty until `set` or a checkpoint fills them.
        probabilities: likewise.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.full((size, 3), -1, dtype=torch.int32))
        self.probabilities: Tensor
        self.register_buffer("probabilities", torch.zeros(size, dtype=torch.float16))
        self._continuations: Continuations | None = None
        self.register_load_state_dict_post_hook(NgramTable._forget)

    def set(self, ngrams: Ngrams) -> None:
        """Take these continuations, as many as there are."""
        self.token_ids.copy_(ngrams.token_ids)
        self.probabilities.copy_(ngrams.probabilities)
        self._forget()

    @property
    def is_set(self) -> bool:
        """Whether there are any continuations."""
        return bool((self.token_ids >= 0).any())

    @property
    def continuations(self) -> Continuations:
        """See `Continuations`."""
        if self._continuations is None:
            self._continuations = Ngrams(self.token_ids, self.probabilities).continuations()
        return self._continuations

    def _forget(self, *_: object) -> None:
        self._continuations = None
