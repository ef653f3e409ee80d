"""The contract of `AuxiliaryFeatures`."""

from __future__ import annotations

import torch
from torch import Tensor

from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.testing.contract import LARGEST, require, require_plain_data, uniform

SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3, 4), (0, 2))
NUM_DRAWS = 20_000
NUM_PAIRS = 50_000
MIN_PAIRS = 20_000
MIN_MAGNITUDE, MAX_MAGNITUDE = 0.7, 1.02


def check_features(features: AuxiliaryFeatures) -> None:
    """Check that features of u keep the promises of their base class.

    Raises:
        AssertionError: says which one is broken.

    >>> from ptp_lightning.models import CosineFeatures
    >>> check_features(CosineFeatures(8))
    """
    for shape in SHAPES:
        _check_shape(features, uniform(*shape))
    magnitude = features(uniform(NUM_DRAWS)).double().square().mean().sqrt().item()
    require(
        MIN_MAGNITUDE < magnitude < MAX_MAGNITUDE,
        f"expected a root mean square between {MIN_MAGNITUDE} and {MAX_MAGNITUDE} for uniform u, found {magnitude:.3f}",
    )
    ends = features(torch.tensor([0.0, 5e-324, LARGEST], dtype=torch.float64))
    require(ends.isfinite().all(), f"expected finite features at both ends of [0, 1), found {ends.tolist()}")
    _check_precision(features)
    _check_resolution(features)
    require_plain_data(features=features)


def _check_shape(features: AuxiliaryFeatures, u: Tensor) -> None:
    found = features(u)
    expected = (*u.shape, features.num_features)
    require(found.shape == expected, f"expected the shape {expected}, found {tuple(found.shape)}")
    require(found.dtype == torch.float32, f"expected float32, found {found.dtype}")
    alone = [features(value) for value in u.flatten()]
    for row, one in zip(found.reshape(-1, features.num_features), alone, strict=True):
        torch.testing.assert_close(row, one, rtol=2.0**-23, atol=1e-11, msg=lambda text: f"u alone differs: {text}")


def _check_precision(features: AuxiliaryFeatures) -> None:
    """Next to the ends of cells and where a smooth map passes zero, rounding would show."""
    ends = torch.cat([torch.arange(1, cells, dtype=torch.float64) / cells for cells in (2, 7, 256)])
    u = torch.cat([ends - 2.0**-40, ends + 2.0**-40])
    require(
        not torch.equal(features(u), features(u.float().double())),
        "expected features of the float64 u, found those of u rounded to float32 before the map",
    )


def _check_resolution(features: AuxiliaryFeatures) -> None:
    """A hundred thousand u, a resolution apart or up to two, as far as float64 has such pairs."""
    resolution = features.resolution
    require(0 < resolution <= 1, f"expected a resolution in (0, 1], found {resolution}")
    u = torch.cat([uniform(NUM_PAIRS), uniform(NUM_PAIRS) * 2 * resolution])
    v = u + resolution * (1 + uniform(2 * NUM_PAIRS).flip(0)) + 2.0**-52
    u, v = u[v < 1], v[v < 1]
    require(len(u) > MIN_PAIRS, f"expected a resolution of which [0, 1) holds several, found {resolution}")
    alike = (features(u) == features(v)).all(-1)
    require(
        not alike.any(),
        f"expected different features of any u and v with |u - v| >= {resolution} (resolution), found the same for "
        f"{u[alike][:1].tolist()} and {v[alike][:1].tolist()}",
    )
