"""What all contract tests share: how a broken rule is said, and parts that come back from plain data."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ptp_lightning.models.config import PredictorConfig

LARGEST = 1 - 2.0**-53
"""The largest float64 below 1."""


def require(holds: object, rule: str) -> None:
    """Raise an AssertionError that states a rule, unless it holds.

    >>> require(1 + 1 == 2, "expected arithmetic")
    """
    if not holds:
        raise AssertionError(rule)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """float64 in [0, 1)."""
    return torch.rand(shape, dtype=torch.float64, generator=generator(seed))


def generator(seed: int = 0) -> torch.Generator:
    """A source of randomness on the CPU."""
    return torch.Generator().manual_seed(seed)


def require_plain_data(**parts: Any) -> None:
    """Require that parts of a predictor's configuration can be stored as JSON and read back.

    Args:
        **parts: by their key below `predictor`.
    """
    config = PredictorConfig(**parts)
    for key, part in parts.items():
        kind = type(part)
        require("<locals>" not in kind.__qualname__, f"expected {kind.__name__} at the top of a module: YAML names it")
        plain = json.loads(json.dumps(config.to_dict()))
        restored = PredictorConfig.from_dict(plain, trusted_classes=None)
        require(
            getattr(restored, key) == part,
            f"expected {key} {part} to be a frozen dataclass of plain data, found {getattr(restored, key)} when it is "
            "read back",
        )
