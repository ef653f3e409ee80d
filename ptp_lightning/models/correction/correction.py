"""Correction: what predicts the tokens of a draft again, given the tokens before them.

A slot of a window does not know the tokens that other slots predict. A correction gives it the token that the slot
stands for, the one before the token that it predicts. In training these are the true tokens, so all slots are corrected
in parallel. In decoding they are drafted tokens, and there are two orders:

* `left_to_right`: slot after slot, each corrected once, given the final token of the slot before it.
* `parallel`: all slots at once, several times; step k settles token k + 1 of the window.

A wrong token makes a worse draft; it never changes a committed token.

A new correction is a frozen dataclass with `build`, a module, and one `class_path` line of YAML.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Order = Literal["left_to_right", "parallel"]

KEY = "predictor.correction.init_args"

SlotHead = Callable[[Tensor], Tensor]
"""The output head of slots: hidden states `[..., H]` to logits `[..., N]` of the tokens that slots can draft."""

NextLogits = Callable[[int, Tensor], Tensor]
"""Slot j and the embeddings `[B, W, H]` of W tokens it may stand for, to its logits after each, `[B, W, N]`."""


class Correction(ABC):
    """Settings of a correction.

    Attributes:
        num_refinement_steps: how often a draft is corrected in the order `parallel`.
    """

    num_refinement_steps: int

    @property
    @abstractmethod
    def is_left_to_right(self) -> bool:
        """Whether drafts are corrected slot after slot."""

    @abstractmethod
    def build(self, model: PreTrainedModel, num_logits: int) -> CorrectionModule:
        """The module, trainable and in float32; untrained, it changes no prediction.

        Args:
            model: the base model.
            num_logits: N, number of tokens that slots can draft.
        """


@dataclass(frozen=True, kw_only=True)
class HeadCorrection(Correction):
    """A correction without attention, whose result for a slot depends on this slot and one token alone.

    Args:
        order: `left_to_right` or `parallel`, see `ptp_lightning.models.correction.correction`.
        num_refinement_steps: of the order `parallel`.

    Raises:
        ValueError: a value is out of range; names the key.
    """

    order: Order = "left_to_right"
    num_refinement_steps: int = 3

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"expected {KEY}.order left_to_right or parallel, found {self.order!r}")
        require_at_least("num_refinement_steps", self.num_refinement_steps, 1)

    @property
    def is_left_to_right(self) -> bool:
        """See `Correction`."""
        return self.order == "left_to_right"

    @abstractmethod
    def build(self, model: PreTrainedModel, num_logits: int) -> CorrectionHead:
        """See `Correction.build`."""


class CorrectionModule(nn.Module):
    """The trained part of a correction.

    `Refiner` reads pairs of the context, so it needs a pass over the context and a cache; a `CorrectionHead` does not.
    """


class CorrectionHead(CorrectionModule, ABC):
    """The module of a `HeadCorrection`.

    A corrected slot is `[..., H + F]`: a hidden state for the output head, and F features of a bias that is added to
    its logits. F is 0 unless a subclass overrides `logit_bias`.
    """

    @abstractmethod
    def forward(self, hidden: Tensor, token_embeddings: Tensor) -> Tensor:
        """Correct slots, each given one token.

        Args:
            hidden: `[..., H]`, last hidden states of slots, after the final norm.
            token_embeddings: `[..., H]`, the base model's embeddings of the tokens that the slots stand for.

        Returns:
            `[..., H + F]`.
        """

    def logit_bias(self, features: Tensor) -> Tensor:
        """What is added to the logits of corrected slots with F > 0: `[..., F]` to `[..., N]`."""
        raise NotImplementedError(f"{type(self).__name__} adds no features to hidden states")

    @abstractmethod
    def next_logits(self, hidden: Tensor, head: SlotHead) -> NextLogits:
        """Prepare the order `left_to_right`: everything that does not depend on tokens is computed for all slots.

        Args:
            hidden: `[B, J, H]`, last hidden states of slots.
            head: of uncorrected slots.
        """


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Refuse a setting of a correction that is too small; raises ValueError with its key."""
    if value < minimum:
        raise ValueError(f"expected {KEY}.{name} >= {minimum}, found {value}")
