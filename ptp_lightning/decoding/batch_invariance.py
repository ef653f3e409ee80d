"""Steady calls: a token's hidden state in 16 bits does not depend on what else its call reads.

Decoders promise equal texts, though one reads a token alone and the other in front of a draft. Kernels for one row and
for several sum in another order, and where a sum lies next to the border between two bfloat16 numbers, the result is
rounded otherwise; a few layers later every hidden state differs, and near-ties of tokens break the other way. So

* attention is computed in float64, whose sums differ by so little that no border lies between them;
* on a GPU, so are the means of norms; and linear layers, whose kernel is chosen by the number of rows, get
  `ROWS_OF_PRODUCT` rows at a time, the last of them filled up with zeros. Where reading the weights decides how long a
  product takes, zeros cost nothing. On a CPU linear layers and norms treat each row alike.

In float32 the differences are a thousand times smaller than what parts tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_in_float64"
ROWS_OF_PRODUCT = 64


@contextmanager
def batch_invariant(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, calls of a 16-bit model are batch_invariant. Other models stay as they are.

    Args:
        model: or what belongs to it, its head for instance, runs in the block.
    """
    if model.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    _register()
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        with _BatchInvariantRows() if _products_depend_on_rows(model.device) else nullcontext():
            yield
    finally:
        config._attn_implementation = before


def _products_depend_on_rows(device: torch.device) -> bool:
    return device.type != "cpu"


class _BatchInvariantRows(TorchFunctionMode):
    """Products of matrices with a fixed number of rows, and means in float64, whoever asks for them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _BATCH_INVARIANT.get(func, func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = _by_rows(lambda rows: F.linear(rows, weight, bias), input.reshape(-1, input.shape[-1]))
    return result.view(*input.shape[:-1], -1)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **options: Any) -> Tensor:
    """As GPT-2's linear layers use it: `input` is a bias."""
    return _by_rows(lambda rows: torch.addmm(input, rows, mat2, **options), mat1)


def _by_rows(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`product(rows)` `[M, out]` of `[M, in]`, some rows at a time."""
    num_rows = len(rows)
    filled = F.pad(rows, (0, 0, 0, -num_rows % ROWS_OF_PRODUCT))
    parts = [product(part) for part in filled.split(ROWS_OF_PRODUCT)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]


def _mean(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.double().mean(*args, **kwargs).to(input.dtype)


_BATCH_INVARIANT: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.mean: _mean,
    Tensor.mean: _mean,
}


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As attention functions of transformers: `[B, heads, T, head size]` to `[B, T, heads, head size]`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attended, _ = sdpa_attention_forward(module, query.double(), key.double(), value.double(), attention_mask, **kwargs)
    return attended.to(query.dtype), None
