"""AuxiliaryFeatures: fixed maps from u to features, the input of the auxiliary embedding's trained head.

A new map is one frozen dataclass with `num_features`, `resolution` and `__call__`, plus one `class_path` line of YAML.

Each token has an interval of u whose width is its probability, so the relevant widths span orders of magnitude. Stepped
maps (`stepped_features.py`) are discontinuous at fixed points, which are not the ends of intervals. Among the
continuous maps (`continuous_features.py`), `MultiscaleHatFeatures` and `ScaleFreeCosineFeatures`, both our own, give
every octave of widths the same weight.
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
        """Any u, v in [0, 1) with `|u - v| >= resolution` get different float32 features."""

    @abstractmethod
    def __call__(self, auxiliaries: Tensor) -> Tensor:
        """Map `[...]` float64 in [0, 1) to `[..., F]` float32 of magnitude about one.

        The root mean square over features and uniform u is between 0.7 and 1.
        """


def require_at_least(name: str, found: int, least: int) -> None:
    """Refuse a size of a map that is too small; names the key."""
    if found < least:
        raise ValueError(f"expected predictor.features.init_args.{name} >= {least}, found {found}")
