"""AuxiliaryEmbedding: the trained head that maps fixed features of u into the model's embedding space."""

import math
from typing import Literal

from torch import Tensor, nn

from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures

SILU_GAIN = 1.7  # SiLU of a unit normal has a root mean square of 0.6


class AuxiliaryEmbedding(nn.Module):
    """Features of u through a linear or two-layer head.

    Args:
        features: the fixed map.
        head: `linear`, or `mlp` with one hidden layer of `hidden_size` SiLU units.
        hidden_size: H, width of the model.
        scale: root mean square of the output at initialisation (that of the token embeddings).

    >>> import torch
    >>> from ptp_lightning.models import CosineFeatures
    >>> embedding = AuxiliaryEmbedding(CosineFeatures(num_frequencies=4), "mlp", hidden_size=8, scale=0.1)
    >>> embedding(torch.rand(2, 3, dtype=torch.float64)).shape
    torch.Size([2, 3, 8])
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
