"""Packed linear layers: products of a few tokens on a CPU that do not rearrange the weights in every call.

A matrix product of a few rows first copies the weights into the order in which its kernel reads them, and this takes as
long as the product itself. oneDNN can keep a copy in that order. A product of one row rearranges nothing, so a step of
the autoregressive loop stays as it is, and a call that verifies a draft costs less in comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_WEIGHT_SIZE = 2**17
"""Numbers in a weight that is packed; the overhead of a call outweighs the gain of smaller ones."""
MAX_TOTAL_BYTES = 2**30
"""Of all copies of a model. Beyond it even a call of one token is limited by memory, and the copies take too much."""
EXPECTED_ROWS = 16  # a hint for oneDNN; measured to be as good as any for 2 to 512 rows


class PackedWeights:
    """Copies of linear weights in oneDNN's order, made when they are first needed and kept for later calls.

    A network holds one, so that packing costs nothing after the first text. A copy follows its weight: when the weight
    changes, it is made again. Copies are not part of the network's state, of its files or of copies of the network.

    >>> layer, rows = nn.Linear(512, 512), torch.randn(4, 512)
    >>> with torch.no_grad(), PackedWeights().in_use(layer):
    ...     packed = layer(rows)
    >>> torch.allclose(packed, nn.functional.linear(rows, layer.weight, layer.bias), atol=1e-5)
    True
    """

    def __init__(self) -> None:
        self._by_layer: WeakKeyDictionary[nn.Linear, _PackedWeight] = WeakKeyDictionary()

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Let a model's large float32 linear layers on a CPU multiply with packed weights inside the block.

        Each layer gets a `forward` of its own, which is removed at the end. It uses the packed weight where no gradient
        is wanted and a call has several rows; results differ from the plain layer's by the order of sums. bfloat16
        layers, other devices, and models whose copies would take more than `MAX_TOTAL_BYTES` stay as they are.

        Args:
            model: its weights and `state_dict` are not changed.
        """
        layers = [layer for layer in _packable_layers(model) if "forward" not in vars(layer)]
        for layer in layers:
            packed = self._by_layer.setdefault(layer, _PackedWeight())
            cast(Any, layer).forward = partial(packed.linear, layer)
        try:
            yield
        finally:
            for layer in layers:
                del cast(Any, layer).forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class _PackedWeight:
    """The packed weight of one layer."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._source: tuple[int, int] | None = None  # address and version of the weight that is packed

    def linear(self, layer: nn.Linear, input: Tensor) -> Tensor:
        """The layer's output: `[..., in]` to `[..., out]`."""
        weight, bias = layer.weight, layer.bias
        is_one_row = input.numel() == input.shape[-1]
        if is_one_row or torch.is_grad_enabled() or weight.is_inference():  # inference tensors have no version
            return F.linear(input, weight, bias)
        source = (weight.data_ptr(), weight._version)
        if self._source != source:
            self._packed = _pack(weight) if _is_packable(weight) else None
            self._source = source
        if self._packed is None or input.dtype != torch.float32:
            return F.linear(input, weight, bias)
        return _ops()._linear_pointwise(input, self._packed, bias, "none", [], "")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


def _packable_layers(model: nn.Module) -> list[nn.Linear]:
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _is_packable(layer.weight)]
    if not layers or sum(layer.weight.nbytes for layer in layers) > MAX_TOTAL_BYTES or not _is_available():
        return []
    return layers


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= MIN_WEIGHT_SIZE


def _pack(weight: Tensor) -> Tensor:
    return _ops()._reorder_linear_weight(weight.detach(), EXPECTED_ROWS)


@cache
def _is_available() -> bool:
    """Whether this build of torch has the operators and they work; they are not part of torch's public interface."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad():
            weight, rows = torch.eye(64), torch.arange(128.0).view(2, 64)
            return torch.equal(_ops()._linear_pointwise(rows, _pack(weight), None, "none", [], ""), rows)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _ops() -> Any:
    return torch.ops.mkldnn
