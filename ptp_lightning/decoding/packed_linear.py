"""Packed linear layers: what a call of a few tokens costs on a CPU is mostly the rearranging of weights.

A matrix product of few rows first copies the weights into the order in which its kernel reads them, which takes as long
as the product itself. oneDNN can keep weights in that order. For one token alone nothing is rearranged, so a step of
the autoregressive loop stays as it is, and a call that verifies a draft becomes cheaper in comparison.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_SIZE = 2**17  # numbers in weights that are packed; a call's overhead outweighs the gain of smaller ones
LARGEST_BYTES = (
    2**30
)  # of all copies of a model; beyond, even one token waits for memory, and a copy costs too much of it
USUAL_ROWS = 16  # what oneDNN is told to expect; measured no worse for 2 to 512


def pack_linear_layers(model: nn.Module) -> None:
    """Let a model's float32 linear layers on a CPU keep a copy of their weights in the order that products read.

    It acts where no gradient is wanted, and follows when weights change. Results differ from those of the plain layers
    as sums in another order do. Doing it again is free; models whose linear layers take more than `LARGEST_BYTES`,
    bfloat16 ones and other devices stay as they are.

    Args:
        model: its layers get a `forward` of their own, in place; weights and `state_dict` are untouched.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _is_packable(layer.weight)]
    if not layers or sum(layer.weight.nbytes for layer in layers) > LARGEST_BYTES or not _is_available():
        return
    for layer in layers:
        if "forward" not in vars(layer):
            cast(Any, layer).forward = _PackedForward(layer)


class _PackedForward:
    """The `forward` of one layer; copies of the layer, and its file, do without the packed weights.

    Args:
        layer: whose it is.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._packed: Tensor | None = None
        self._packed_from: tuple[int, int] | None = None  # where the weights lay, and their version

    def __call__(self, input: Tensor) -> Tensor:
        """`[..., features in]` to `[..., features out]`."""
        weight, bias = self._layer.weight, self._layer.bias
        is_one_token = input.numel() == input.shape[-1]
        if is_one_token or torch.is_grad_enabled() or weight.is_inference():  # the last have no version
            return F.linear(input, weight, bias)
        state = (weight.data_ptr(), weight._version)
        if self._packed_from != state:
            self._packed = _ops()._reorder_linear_weight(weight.detach(), USUAL_ROWS) if _is_packable(weight) else None
            self._packed_from = state
        if self._packed is None or input.dtype != torch.float32:
            return F.linear(input, weight, bias)
        return _ops()._linear_pointwise(input, self._packed, bias, "none", [], "")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of the copied layer, which `copy.deepcopy` is about to make or has made."""
        return type(self)(copy.deepcopy(self._layer, memo))

    def __reduce__(self) -> tuple[type[Self], tuple[nn.Linear]]:
        return type(self), (self._layer,)


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST_SIZE


@cache
def _is_available() -> bool:
    """Whether this build of torch can do it, tried on a small example: these operators are torch's own affair."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad():
            weight, rows = torch.eye(64), torch.arange(128.0).view(2, 64)
            packed = _ops()._reorder_linear_weight(weight, USUAL_ROWS)
            return torch.equal(_ops()._linear_pointwise(rows, packed, None, "none", [], ""), rows)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _ops() -> Any:
    return torch.ops.mkldnn
