"""WindowSource: fills the windows of a batch with tokens, auxiliaries and distributions.

A new source is one class with `sample`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.distributions import Distributions
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork

SLOT_POSITIONS = (..., slice(1, None))
"""The positions of windows that slots predict, as an index into `[B, N, L]`."""


class WindowSample(NamedTuple):
    """The windows of a batch.

    Attributes:
        token_ids: `[B, N, L]` int64.
        auxiliaries: `[B, N, L]` float64; `pick(auxiliaries, teacher) == token_ids` where the mask is true.
        mask: `[B, N, L]` bool, true on a prefix of each window.
        teacher: `[B, N, L]` distributions that the tokens were picked from.
        target: `[B, N, L]` distributions that students learn, see `SamplingConfig.target`.
        conditioning_ids: `[B, N, L]` int64, the tokens that the distributions are conditioned on: those at position k
            follow these tokens before k. They differ from `token_ids` only if the student wrote the windows.
    """

    token_ids: Tensor
    auxiliaries: Tensor
    mask: Tensor
    teacher: Distributions
    target: Distributions
    conditioning_ids: Tensor


class WindowSource(ABC):
    """Fills the windows of a batch."""

    @abstractmethod
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """Tokens, auxiliaries and distributions of every window; no gradients.

        Args:
            predictor: base model and student.
            context: of `predictor.encode`; its sampling settings apply.
            generator: of all random draws.
        """

    def choose(self, progress: float, generator: torch.Generator) -> WindowSource:
        """The source of one training step: this one, unless it is a mixture.

        Args:
            progress: fraction of the training steps that are done, 0 .. 1.
            generator: of the step.
        """
        return self

    @property
    def depends_on_progress(self) -> bool:
        """Whether `choose` depends on the fraction of the training steps that are done; so if it is overridden."""
        return type(self).choose is not WindowSource.choose

    @property
    def reads_rows(self) -> bool:
        """Whether windows hold tokens of the rows."""
        return False


def until_end_of_text(token_ids: Tensor, end_of_text: int | None) -> Tensor:
    """`[..., L]` bool: true up to and including the first end-of-text token.

    >>> until_end_of_text(torch.tensor([[5, 0, 6, 0], [5, 6, 7, 8]]), end_of_text=0)
    tensor([[ True,  True, False, False],
            [ True,  True,  True,  True]])
    """
    if end_of_text is None:
        return torch.ones_like(token_ids, dtype=torch.bool)
    is_end = (token_ids == end_of_text).long()
    return is_end.cumsum(-1) - is_end == 0
