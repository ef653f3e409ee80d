"""Batch invariance of any model: a token's hidden state does not depend on what else its call reads.

All decoders promise the same text, but one reads a token alone and another reads it together with a draft. Kernels for
one row and for several rows add in different orders. Such a difference can round a result to the next number; a few
layers later every hidden state differs, and tokens are picked differently where u is near a border. Therefore

* attention is computed in float64, where the differences are too small to change what a result is rounded to;
* on a GPU the means of norms are computed in float64 as well;
* on a GPU matrix products, whose kernel depends on the number of rows, get `PRODUCT_ROWS` rows at a time, padded with
  zeros. Padding is free where reading the weights takes longest. On a CPU, this holds for the layers of GPT-2, which
  are not `nn.Linear`; all others are row-invariant inside `prepare_for_decoding`.

On a CPU this is done in float32 and in 16 bits. Two things are likely rather than certain there. A float64 result is
rounded alike; a number differs with a chance of about 1e-9 in float32, and of less in bfloat16. And torch, which
divides activations among threads, does not divide a vector of float32 numbers. Models that `JoinedDecoder` supports
need neither.

On a GPU, models in float32 stay as they are. Differences between calls of different shapes are small there, but they
exist, and a u that is very near a border is picked otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ptp_lightning.models.attention.eager_attention import needs_eager_attention, register_eager_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "sdpa_in_float64"
PRODUCT_ROWS = 64
_HAS_CONV1D: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # a search takes 2 to 4 ms for SmolLM2


@contextmanager
def batch_invariant(model: PreTrainedModel) -> Iterator[None]:
    """Make calls of a model, or of parts of it such as its head, batch-invariant inside the block.

    The model's attention function is exchanged for the block. On a GPU, torch's matrix products and means are exchanged
    as well, by a `TorchFunctionMode`: it reaches those of every module, adapters included, and changes no module.

    Args:
        model: on another device than a CPU it stays as it is unless it has 16 bits.
    """
    if model.device.type != "cpu" and model.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    name = register_eager_attention(in_float64=True) if needs_eager_attention(model) else _register()
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        with _BatchInvariantRows() if _products_depend_on_rows(model) else nullcontext():
            yield
    finally:
        config._attn_implementation = before


def _products_depend_on_rows(model: PreTrainedModel) -> bool:
    if model.device.type != "cpu":
        return True
    if model not in _HAS_CONV1D:
        _HAS_CONV1D[model] = any(isinstance(module, Conv1D) for module in model.modules())
    return _HAS_CONV1D[model]


class _BatchInvariantRows(TorchFunctionMode):
    """Replaces matrix products by products of a fixed number of rows, and means by means in float64."""

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
    """As the linear layers of GPT-2 use it: `input` is a bias."""
    return _by_rows(lambda rows: torch.addmm(input, rows, mat2, **options), mat1)


def _by_rows(product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`product(rows)`, `[M, in]` to `[M, out]`, in calls of `PRODUCT_ROWS` rows each."""
    num_rows = len(rows)
    padded = F.pad(rows, (0, 0, 0, -num_rows % PRODUCT_ROWS))
    parts = [product(part) for part in padded.split(PRODUCT_ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]


def _mean(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.double().mean(*args, **kwargs).to(input.dtype)


_BATCH_INVARIANT: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.mean: _mean,
    Tensor.mean: _mean,
}


def _register() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    return ATTENTION_NAME


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: `[B, heads, T, head size]` to `[B, T, heads, head size]`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None and attention_mask.is_floating_point():
        # Kernels of a CPU read a mask of another dtype as if it had that of the queries.
        attention_mask = attention_mask.double()
    attended, _ = sdpa_attention_forward(module, query.double(), key.double(), value.double(), attention_mask, **kwargs)
    return attended.to(query.dtype), None
