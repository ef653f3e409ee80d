"""One adapter for many sampling settings: which ones it is trained for, and how slots are told the one in use.

What a u means depends on temperature, top-k and top-p, so a student that knows them can imitate all of these teachers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptp_lightning.sampling import SamplingConfig

HIDDEN_UNITS = 64


@dataclass(frozen=True)
class SamplingRange:
    """Sampling settings that an adapter is trained for: each training batch draws one of them.

    Best with windows that the teacher samples: a window of the data ends before a token that the drawn settings cut
    off, which greedy ones do to all tokens but one.

    Args:
        min_temperature: of the uniform distribution that temperatures are drawn from.
        max_temperature: the same.
        greedy_probability: of temperature 0 instead.
        top_k: equally likely choices; null keeps all tokens.
        top_p: equally likely choices.

    Raises:
        ValueError: a value is out of range, or nothing is left to choose from; names the key.
    """

    min_temperature: float = 0.3
    max_temperature: float = 1.2
    greedy_probability: float = 0.1
    top_k: tuple[int | None, ...] = (50,)
    top_p: tuple[float, ...] = (0.9,)

    def __post_init__(self) -> None:
        key = "predictor.sampling_range"
        if not 0 < self.min_temperature <= self.max_temperature:
            raise ValueError(
                f"expected 0 < {key}.min_temperature <= {key}.max_temperature, found {self.min_temperature} and "
                f"{self.max_temperature} (greedy decoding has {key}.greedy_probability)"
            )
        if not 0 <= self.greedy_probability <= 1:
            raise ValueError(f"expected 0 <= {key}.greedy_probability <= 1, found {self.greedy_probability}")
        for name, choices in (("top_k", self.top_k), ("top_p", self.top_p)):
            if len(choices) == 0 or len(set(choices)) < len(choices):
                raise ValueError(f"expected one or more different choices in {key}.{name}, found {list(choices)}")
        try:
            for temperature in (self.min_temperature, self.max_temperature):
                for top_k in self.top_k:
                    for top_p in self.top_p:
                        SamplingConfig(temperature, top_k, top_p)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def draw(self, base: SamplingConfig, generator: torch.Generator) -> SamplingConfig:
        """Settings at random, in the order of `base`; the same state of the generator gives the same settings."""
        share, place, k, p = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        span = self.max_temperature - self.min_temperature
        temperature = 0.0 if share < self.greedy_probability else self.min_temperature + place * span
        top_k, top_p = self.top_k[int(k * len(self.top_k))], self.top_p[int(p * len(self.top_p))]
        return replace(base, temperature=temperature, top_k=top_k, top_p=top_p)

    def covers(self, sampling: SamplingConfig) -> bool:
        """Whether these settings are drawn, or lie between settings that are."""
        ranks = [math.inf if top_k is None else top_k for top_k in self.top_k]
        rank = math.inf if sampling.top_k is None else sampling.top_k
        if sampling.temperature == 0:  # nothing else matters
            return self.greedy_probability > 0
        return (
            self.greedy_probability < 1
            and self.min_temperature <= sampling.temperature <= self.max_temperature
            and min(ranks) <= rank <= max(ranks)
            and min(self.top_p) <= sampling.top_p <= max(self.top_p)
        )


class SettingsEmbedding(nn.Module):
    """Temperature, top-k and top-p -> a vector that is added wherever they must be known; zero at first.

    Args:
        vocabulary_size: V, what top-k is when it keeps all tokens.
        hidden_size: H, width of the model.
    """

    def __init__(self, vocabulary_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
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
        """Whether greedy, temperature, log top-k in units of log V, top-p; greedy decoding has no other settings."""
        if sampling.temperature == 0:
            return [1.0, 0.0, 0.0, 0.0]
        top_k = min(sampling.top_k or self.vocabulary_size, self.vocabulary_size)
        return [0.0, sampling.temperature, math.log(top_k) / math.log(self.vocabulary_size), sampling.top_p]
