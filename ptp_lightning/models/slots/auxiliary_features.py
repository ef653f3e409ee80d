"""u -> features: fixed maps of an auxiliary, of which a trained head makes an embedding.

A new one is one frozen dataclass with `num_features`, `resolution` and `__call__`, plus one `class_path` line of YAML.

What a map is made for: a token owns an interval of u, and the intervals' widths are probabilities, which span orders of
magnitude. Stepped maps (`stepped_features.py`) jump where no interval ends; of the others (`continuous_features.py`),
`MultiscaleHatFeatures` and `ScaleFreeCosineFeatures`, our own, give every octave of widths the same weight.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AuxiliaryFeatures(ABC):
    """A fixed map from auxiliaries to features."""

    @property
    @abstractmethod
    def num_features(self) -> int:
        """F, length of the feature vector."""

    @property
    @abstractmethod
    def resolution(self) -> float:
        """Any u, v in [0, 1) with |u - v| >= resolution get different float32 features."""

    @abstractmethod
    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Map `[...]` float64 in [0, 1) to `[..., F]` float32 of magnitude about one.

        The root mean square over features and uniform u is between 0.7 and 1.
        """


def require_at_least(name: str, found: int, least: int) -> None:
    """Refuse a size of a map that is too small; names the key."""
    if found < least:
        raise ValueError(f"expected predictor.features.init_args.{name} >= {least}, found {found}")
