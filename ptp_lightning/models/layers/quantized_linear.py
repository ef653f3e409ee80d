"""Linear layers with weights of 8 bits, for drafts on a CPU.

A product of a few rows takes as long as reading its weights, and these are half as many bytes as in bfloat16. Inputs
are rounded, too, with one scale for all rows of a product, so that a row of the result depends on the others. Drafts
may; what verifies them is exact and is never quantised.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ENGINE = "fbgemm"
"""Of the engines of torch the one that is fastest for 2 to 8 rows."""
LARGEST_WEIGHT = 127  # of 8 bits with a sign


class DraftLinear(nn.Linear):
    """A linear layer whose results matter to drafts alone; decoding may round its weights.

    Attributes:
        of_bfloat16_model: whether it belongs to a model in bfloat16, although its own weights may be in float32.
    """

    of_bfloat16_model = False


class QuantizedLinear:
    """Linear layers with the same input as one product, rounded to 8 bits.

    Args:
        layers: their outputs follow each other in the result. `is_quantizable` holds.

    >>> layers, rows = [nn.Linear(64, 4), nn.Linear(64, 2)], torch.randn(5, 64)
    >>> with torch.no_grad():
    ...     difference = QuantizedLinear(layers)(rows) - torch.cat([layer(rows) for layer in layers], dim=1)
    >>> bool((difference.abs() < 0.1).all())
    True
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers]).float()
        scales = (weight.abs().amax(dim=1).double() / LARGEST_WEIGHT).clamp_min(torch.finfo(torch.float32).tiny)
        zero_points = torch.zeros(len(weight), dtype=torch.long)
        has_bias = any(layer.bias is not None for layer in layers)
        bias = torch.cat([_bias(layer) for layer in layers]).float() if has_bias else None
        with _engine(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a future torch may lack these operators: then nothing `is_quantizable`
            rounded = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
            self._weight = torch.ops.quantized.linear_prepack(rounded, bias)

    def __call__(self, rows: Tensor) -> Tensor:
        """`[M, in]` to `[M, out]`, in the dtype of the input."""
        # 7 bits for the input, because processors without VNNI add products of 8 bits in 16.
        return torch.ops.quantized.linear_dynamic(rows.float(), self._weight, reduce_range=True).to(rows.dtype)


def is_quantizable(layer: nn.Module) -> bool:
    """Whether a layer is a linear one on a CPU, in bfloat16 or of a model in it, and the operators are there.

    Layers in float32 else stay as they are: who decodes in float32 has a small model, or asks for its accuracy.

    >>> is_quantizable(nn.Linear(8, 8))
    False
    """
    if type(layer) not in (nn.Linear, DraftLinear) or layer.weight.device.type != "cpu":
        return False
    in_bfloat16 = layer.weight.dtype == torch.bfloat16 or getattr(layer, "of_bfloat16_model", False)
    return in_bfloat16 and _is_available()


@contextmanager
def _engine() -> Iterator[None]:
    """Weights are prepared for the engine of this moment, and keep it."""
    settings: Any = torch.backends.quantized
    before = settings.engine
    settings.engine = ENGINE
    try:
        yield
    finally:
        settings.engine = before


@cache
def _is_available() -> bool:
    if ENGINE not in torch.backends.quantized.supported_engines:
        return False
    try:
        with torch.no_grad():
            layer = nn.Linear(64, 64, bias=False)
            layer.weight.copy_(torch.eye(64))
            rows = torch.eye(64)[:2]
            return torch.allclose(QuantizedLinear([layer])(rows), rows, atol=0.1)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
