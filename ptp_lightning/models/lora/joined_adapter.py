"""JoinedAdapter: the low-rank updates of linear layers with the same input as one, for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp_lightning.models.lora.gated_linear import GatedLoraLinear


class JoinedAdapter:
    """The updates `s B A x` of several layers, whose outputs follow each other: `blockdiag(s B) stack(A) x`.

    Args:
        layers: linear layers with the same input. Those without an acting adapter have no update.
        dtype: of the input. Weights and `A x` are rounded to it; this affects drafts alone.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        shrink, expand = [], []
        for layer in layers:
            if isinstance(layer, GatedLoraLinear) and layer.acting_adapter is not None:
                a, b, scale = layer.lora_weights
                shrink.append(a.detach())
                expand.append(b.detach().t() * scale)
            else:
                expand.append(torch.empty(0, len(base_layer(layer).weight)))
        self.a = torch.cat(shrink).to(dtype) if shrink else None
        self.b = torch.block_diag(*expand).to(dtype)

    def add_(self, output: Tensor, rows: Tensor) -> None:
        """Add the update to the layers' outputs `[M, out]`, in place, given their input `[M, in]`."""
        if self.a is not None:
            output.addmm_(F.linear(rows, self.a), self.b)


def base_layer(layer: nn.Module) -> nn.Linear:
    """A linear layer without its adapter.

    >>> base_layer(nn.Linear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    base = layer.get_base_layer() if isinstance(layer, GatedLoraLinear) else layer
    assert isinstance(base, nn.Linear)
    return base
