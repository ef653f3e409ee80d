"""SamplingEncoder: conditions slots on the sampling settings, for adapters that are trained for several.

The token that u picks depends on temperature, top-k and top-p. A student that is conditioned on them can imitate the
teacher under all of these settings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ptp_lightning.sampling import SamplingConfig

HIDDEN_UNITS = 64


class SamplingEncoder(nn.Module):
    """Temperature, top-k and top-p to a vector that is added to the input of slots; zero at initialisation.

    Args:
        vocab_size: V, the value of top-k if all tokens are kept.
        hidden_size: H, width of the model.

    >>> SamplingEncoder(vocab_size=100, hidden_size=8)(SamplingConfig(temperature=0.7, top_k=50)).shape
    torch.Size([8])
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.inner = nn.Linear(4, HIDDEN_UNITS)
        self.outer = nn.Linear(HIDDEN_UNITS, hidden_size, bias=False)
        nn.init.normal_(self.inner.weight)
        nn.init.normal_(self.inner.bias)
        nn.init.zeros_(self.outer.weight)

    def forward(self, sampling: SamplingConfig) -> Tensor:
        """The vector `[H]` of these settings, in the dtype of the weights."""
        weight = self.inner.weight
        features = torch.tensor(self.features(sampling), dtype=weight.dtype, device=weight.device)
        return self.outer(nn.functional.silu(self.inner(features)))

    def features(self, sampling: SamplingConfig) -> list[float]:
        """Whether greedy, temperature, `log top_k / log V` and top-p; the last three are 0 for greedy decoding."""
        if sampling.temperature == 0:
            return [1.0, 0.0, 0.0, 0.0]
        top_k = min(sampling.top_k or self.vocab_size, self.vocab_size)
        return [0.0, sampling.temperature, math.log(top_k) / math.log(self.vocab_size), sampling.top_p]
