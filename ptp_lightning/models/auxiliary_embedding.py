"""u -> vector: fixed features of an auxiliary, and the trained head that maps them into the model's embedding space.

A new embedding is one frozen dataclass with `num_features` and `__call__`, plus one `class_path` line of YAML.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

SILU_GAIN = 1.7  # SiLU of a unit normal has a root mean square of 0.6


@dataclass(frozen=True)
class AuxiliaryFeatures(ABC):
    """A fixed map from auxiliaries to features."""

    @property
    @abstractmethod
    def num_features(self) -> int:
        """F, length of the feature vector."""

    @abstractmethod
    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Map `[...]` float64 in [0, 1) to `[..., F]` float32 of magnitude about one."""


@dataclass(frozen=True)
class BinaryFeatures(AuxiliaryFeatures):
    """The first `bits` binary digits of u as -1 and 1 (Draxler et al., ICLR 2026). Resolution 2**-bits."""

    bits: int = 32

    @property
    def num_features(self) -> int:
        """One feature a digit."""
        return self.bits

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Digits, most significant first."""
        place = 2.0 ** torch.arange(1, self.bits + 1, dtype=torch.float64, device=auxiliaries.device)
        return (auxiliaries.double().unsqueeze(-1) * place).floor().remainder(2).mul(2).sub(1).float()


@dataclass(frozen=True)
class CosineFeatures(AuxiliaryFeatures):
    """cos(pi k u) for k = 1 .. num_frequencies: the smooth functions on [0, 1), coarse first.

    The intervals to be told apart are wide for likely tokens, so a smooth map generalises between neighbouring u.
    """

    num_frequencies: int = 64

    @property
    def num_features(self) -> int:
        """One feature a frequency."""
        return self.num_frequencies

    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Cosines of rising frequency."""
        frequency = torch.arange(1, self.num_frequencies + 1, dtype=torch.float64, device=auxiliaries.device)
        return torch.cos(math.pi * auxiliaries.double().unsqueeze(-1) * frequency).float()


class AuxiliaryEmbedding(nn.Module):
    """Features of u through a linear or two-layer head.

    Args:
        features: the fixed map.
        head: `linear`, or `mlp` with one hidden layer of `hidden_size` SiLU units.
        hidden_size: H, width of the model.
        scale: root mean square that a component of the output has at first (that of the token embeddings).
    """

    def __init__(
        self, features: AuxiliaryFeatures, head: Literal["linear", "mlp"], hidden_size: int, scale: float
    ) -> None:
        super().__init__()
        self.features = features
        num_features = features.num_features
        last = nn.Linear(num_features if head == "linear" else hidden_size, hidden_size, bias=False)
        nn.init.normal_(last.weight, std=scale / math.sqrt(last.in_features))
        layers: list[nn.Module] = [last]
        if head == "mlp":
            first = nn.Linear(num_features, hidden_size)
            nn.init.normal_(first.weight, std=SILU_GAIN / math.sqrt(num_features))
            layers = [first, nn.SiLU(), last]
        self.head = nn.Sequential(*layers)

    def forward(self, auxiliaries: Tensor) -> Tensor:
        """Map `[...]` float64 to `[..., H]` in the head's dtype."""
        weight: Tensor = next(self.head.parameters())
        return self.head(self.features(auxiliaries).to(weight.dtype))
