"""JoinedAdapter: the low-rank updates of linear layers with the same input as one, for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypeGuard

import torch
from torch import Tensor, nn

from ptp_lightning.models.layers.packed_linear import PackedLinear, PackedWeights, draft_product
from ptp_lightning.models.layers.quantized_linear import QuantizedLinear
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear


class JoinedAdapter:
    """The updates `s B A x` of several layers, whose outputs follow each other: `blockdiag(s B) stack(A) x`.

    Args:
        layers: linear layers on a CPU with the same input. Those without an acting adapter have no update.
        dtype: of the input. Weights and `A x` are rounded to it; this affects drafts alone.
        pack: see `PackedLinear`.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype, pack: bool = True) -> None:
        shrink, expand = [], []
        for layer in layers:
            if _acts(layer):
                a, b, scale = layer.lora_weights
                shrink.append(a.detach())
                expand.append(b.detach() * scale)
            else:
                expand.append(torch.empty(len(base_layer(layer).weight), 0))
        self._shrink = PackedLinear([_linear(torch.cat(shrink).to(dtype))], pack) if shrink else None
        self._expand = torch.block_diag(*expand).t().to(dtype).contiguous()

    @classmethod
    def kept(cls, layers: Sequence[nn.Module], dtype: torch.dtype, pack: bool, packed_weights: PackedWeights) -> Self:
        """An adapter of the present weights, which is not built again for the next text."""
        acting = [layer.lora_weights for layer in layers if _acts(layer)]
        tensors = [tensor for weights in acting for tensor in (weights.a, weights.b)]
        key = ("adapter", len(layers), dtype, pack, *(weights.scale for weights in acting))
        return packed_weights.copy(layers[0], key, tensors, lambda can_pack: cls(layers, dtype, pack and can_pack))

    def add_(self, output: Tensor, rows: Tensor) -> None:
        """Add the update to the layers' outputs `[M, out]`, in place, given their input `[M, in]`."""
        if self._shrink is not None:
            output.addmm_(self._shrink(rows), self._expand)


def kept_merged(layers: Sequence[nn.Module], packed_weights: PackedWeights) -> PackedLinear | QuantizedLinear:
    """Layers with the same input as one product by `W + s B A`, for calls of slots alone.

    It needs fewer operations than the product and its update, and memory for a second copy of the weights.

    Args:
        layers: as for `JoinedAdapter`. The sum is rounded to the dtype of W, or to 8 bits; this affects drafts alone.
        packed_weights: keeps the copy.
    """
    bases = [base_layer(layer) for layer in layers]
    acting = [layer.lora_weights for layer in layers if _acts(layer)]
    tensors = [tensor for base in bases for tensor in (base.weight, base.bias) if tensor is not None]
    tensors += [tensor for weights in acting for tensor in (weights.a, weights.b)]
    key = ("merged", len(layers), *(weights.scale for weights in acting))
    return packed_weights.copy(
        layers[0], key, tensors, lambda can_pack: draft_product([_merged(layer) for layer in layers], can_pack)
    )


def _merged(layer: nn.Module) -> nn.Linear:
    base = base_layer(layer)
    if not _acts(layer):
        return base
    a, b, scale = layer.lora_weights
    update = scale * (b.detach().float() @ a.detach().float())
    merged = _linear((base.weight.detach().float() + update).to(base.weight.dtype))
    merged.bias = base.bias
    return merged


def _acts(layer: nn.Module) -> TypeGuard[GatedLoraLinear]:
    return isinstance(layer, GatedLoraLinear) and layer.acting_adapter is not None


def _linear(weight: Tensor) -> nn.Linear:
    """A layer with this weight `[out, in]`, without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def base_layer(layer: nn.Module) -> nn.Linear:
    """A linear layer without its adapter.

    >>> base_layer(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    base = layer.get_base_layer() if isinstance(layer, GatedLoraLinear) else layer
    assert isinstance(base, nn.Linear)
    return base
