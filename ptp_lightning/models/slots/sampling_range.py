"""SamplingRange: the sampling settings that one adapter is trained for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ptp_lightning.sampling import SamplingConfig


@dataclass(frozen=True)
class SamplingRange:
    """Sampling settings that an adapter is trained for: each training batch draws one of them.

    Use it with windows that the teacher samples. A window of the dataset ends before a token that the drawn settings
    exclude, and greedy settings exclude all tokens but one.

    Args:
        min_temperature: lower end of the uniform distribution of temperatures.
        max_temperature: upper end.
        greedy_probability: probability of temperature 0 instead.
        top_k: equally likely choices; null keeps all tokens.
        top_p: equally likely choices.

    Raises:
        ValueError: a value is out of range, or there is no choice; names the key.

    >>> settings = SamplingRange(min_temperature=0.5, max_temperature=1.0, top_k=(20, 50), top_p=(0.9, 1.0))
    >>> settings.covers(SamplingConfig(temperature=0.8, top_k=30, top_p=0.95))
    True
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
        """Random settings with the order of `base`; the same state of the generator gives the same settings."""
        greedy, position, k, p = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        span = self.max_temperature - self.min_temperature
        temperature = 0.0 if greedy < self.greedy_probability else self.min_temperature + position * span
        top_k, top_p = self.top_k[int(k * len(self.top_k))], self.top_p[int(p * len(self.top_p))]
        return replace(base, temperature=temperature, top_k=top_k, top_p=top_p)

    def covers(self, sampling: SamplingConfig) -> bool:
        """Whether these settings can be drawn, or lie between settings that can."""
        choices = [math.inf if top_k is None else top_k for top_k in self.top_k]
        top_k = math.inf if sampling.top_k is None else sampling.top_k
        if sampling.temperature == 0:  # the other settings have no effect
            return self.greedy_probability > 0
        return (
            self.greedy_probability < 1
            and not sampling.min_p
            and self.min_temperature <= sampling.temperature <= self.max_temperature
            and min(choices) <= top_k <= max(choices)
            and min(self.top_p) <= sampling.top_p <= max(self.top_p)
        )
