"""What a slot is told and what it proposes: the objectives of the paper, and the encoder that turns u into slots."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ptp_lightning.auxiliary import pick
from ptp_lightning.models.auxiliary_embedding import SILU_GAIN, AuxiliaryEmbedding, AuxiliaryFeatures
from ptp_lightning.sampling import SamplingConfig

MIXER_EXPANSION = 4  # hidden width of the context mixer, in model widths


@dataclass(frozen=True)
class Objective(ABC):
    """Which auxiliaries a slot carries, and how its logits become a token."""

    name: ClassVar[str]
    num_inputs: ClassVar[int]

    @abstractmethod
    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """Split `[..., L]` into the `num_inputs` auxiliaries of each of the L - 1 slots, `[..., L - 1]` each."""

    @abstractmethod
    def propose(self, logits: Tensor, auxiliaries: Tensor, sampling: SamplingConfig) -> Tensor:
        """Tokens `[...]` from logits `[..., V]` and the auxiliaries `[...]` of the predicted tokens."""


@dataclass(frozen=True)
class OneHotObjective(Objective):
    """O-PTP (Theorem 1): a slot carries the u of its own place and of the token it predicts; proposes its argmax."""

    name: ClassVar[str] = "one_hot"
    num_inputs: ClassVar[int] = 2

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """u_{i+j} and u_{i+j+1}."""
        return [auxiliaries[..., :-1], auxiliaries[..., 1:]]

    def propose(self, logits: Tensor, auxiliaries: Tensor, sampling: SamplingConfig) -> Tensor:
        """The most likely token.

        Raises:
            ValueError: a NaN or infinity among the logits.
        """
        token_ids = SamplingConfig(temperature=0).distribution(logits).token_ids
        assert token_ids is not None, "greedy distributions list their one token"
        return token_ids.squeeze(-1)


@dataclass(frozen=True)
class CategoricalObjective(Objective):
    """C-PTP (Theorem 2): a slot carries the u of its own place; proposes Pick(u_k, P_k) for the token it predicts."""

    name: ClassVar[str] = "categorical"
    num_inputs: ClassVar[int] = 1

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """u_{i+j}."""
        return [auxiliaries[..., :-1]]

    def propose(self, logits: Tensor, auxiliaries: Tensor, sampling: SamplingConfig) -> Tensor:
        """Inverse CDF of the predicted distribution at the predicted token's u."""
        return pick(auxiliaries, sampling.proposal().distribution(logits))


@dataclass(frozen=True)
class IndependentObjective(Objective):
    """MTP, the baseline: a slot carries nothing, so it can only learn marginals; scored like C-PTP with the same u."""

    name: ClassVar[str] = "independent"
    num_inputs: ClassVar[int] = 0

    def inputs(self, auxiliaries: Tensor) -> list[Tensor]:
        """Nothing."""
        return []

    def propose(self, logits: Tensor, auxiliaries: Tensor, sampling: SamplingConfig) -> Tensor:
        """Inverse CDF of the predicted marginal at the predicted token's u."""
        return pick(auxiliaries, sampling.proposal().distribution(logits))


class ContextEnd(NamedTuple):
    """What is known of the last context token before a call is made.

    Its own hidden state is not: that token is read in the same call as the slots. The state before it, together with
    the token, tells most of what the base model is about to say.

    Attributes:
        hidden: `[..., H]`, last hidden state of the base model one token earlier; zeros where there is none.
        embedding: `[..., H]`, token embedding of the last context token.
    """

    hidden: Tensor
    embedding: Tensor


class ContextMixer(nn.Module):
    """Slot embeddings and the end of their context -> what to add to the slot embeddings.

    Args:
        hidden_size: H.
        scale: root mean square that a component of the output has at first.
    """

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        width = MIXER_EXPANSION * hidden_size
        self.first = nn.Linear(3 * hidden_size, width)
        self.last = nn.Linear(width, hidden_size, bias=False)
        nn.init.normal_(self.first.weight, std=SILU_GAIN / math.sqrt(3 * hidden_size))
        nn.init.normal_(self.last.weight, std=scale / math.sqrt(width))

    def forward(self, slots: Tensor, context_end: ContextEnd) -> Tensor:
        """Map slots `[..., J, H]` and a context end of `[..., H]` twice to `[..., J, H]`."""
        end = torch.cat([_unit(part.to(slots.dtype)) for part in context_end], dim=-1)
        end = end.unsqueeze(-2).expand(*slots.shape[:-1], -1)
        return self.last(nn.functional.silu(self.first(torch.cat([end, _unit(slots)], dim=-1))))


def _unit(vectors: Tensor) -> Tensor:
    """Each vector with a root mean square of one; zeros stay zeros."""
    return nn.functional.rms_norm(vectors, vectors.shape[-1:], eps=1e-6)


class SlotEncoder(nn.Module):
    """Auxiliaries of a window -> input embeddings of its L - 1 slots.

    A slot's embedding is one learned vector, which starts as the mean token embedding, plus an embedding of each
    auxiliary that the objective lets it carry. With `context_end`, a small network adds what these mean together with
    the end of the context: a slot has to find the distribution of the token it stands for before u can select from it,
    and the frozen layers spend most of their depth on that search when they start from u alone.

    Args:
        objective: what slots carry.
        features: features of u.
        head: head of the auxiliary embedding.
        token_embeddings: `[V, H]`, sets the starting point and scale.
        context_end: whether slots also see the end of the context.
    """

    def __init__(
        self,
        objective: Objective,
        features: AuxiliaryFeatures,
        head: Literal["linear", "mlp"],
        token_embeddings: Tensor,
        context_end: bool,
    ) -> None:
        super().__init__()
        self.objective = objective
        table = token_embeddings.detach().float()
        mean = table.mean(0)
        scale = float((table - mean).square().mean().sqrt())
        self.placeholder = nn.Parameter(mean.clone())
        self.embeddings = nn.ModuleList(
            AuxiliaryEmbedding(features, head, table.shape[1], scale) for _ in range(objective.num_inputs)
        )
        self.context_mixer = ContextMixer(table.shape[1], scale) if context_end else None

    def forward(self, auxiliaries: Tensor, context_end: ContextEnd) -> Tensor:
        """Map auxiliaries `[..., L]` and the end of the context `[..., H]` twice to `[..., L - 1, H]`."""
        slots = self.placeholder.expand(*auxiliaries.shape[:-1], auxiliaries.shape[-1] - 1, -1)
        for embedding, carried in zip(self.embeddings, self.objective.inputs(auxiliaries), strict=True):
            slots = slots + embedding(carried)
        return slots if self.context_mixer is None else slots + self.context_mixer(slots, context_end)
