"""Packed linear layers: products on a CPU that are fast for a few rows and compute each row in the same way.

A matrix product of a few rows first copies the weights into the order in which its kernel reads them, and this takes as
long as the product itself. oneDNN can keep a copy in that order.

Its kernel depends on the number of rows: for a single row, for up to `MAX_PRODUCT_ROWS` and for more, sums run in
different orders. Products are therefore computed `MAX_PRODUCT_ROWS` rows at a time, and a single row is doubled. Then a
row of the result has the same bits whatever other rows there are, in float32 and in bfloat16. The tests of this module
measure it.

A call of oneDNN takes 25 to 30 us before it begins. Small weights in float32 are kept transposed instead, for a plain
product of matrices, which takes 5 us or more. Whether it is row-invariant is measured for each shape (`_adds_alike`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, Self, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp_lightning.models.layers.quantized_linear import DraftLinear, QuantizedLinear, is_quantizable

MAX_TOTAL_BYTES = 2**30
"""Of all copies of a model. Beyond it even a call of one token is limited by memory, and the copies take too much."""
MAX_PRODUCT_ROWS = 32
"""The most rows for which oneDNN's kernels add in the order of two rows. Measured with AVX-512 and with AMX, for 32 to
5,632 inputs and up to 49,152 outputs. With 33 rows in bfloat16, about 1 in 20,000 numbers is rounded otherwise."""
MAX_TRANSPOSED_SIZE = 2**19
"""Numbers of a weight that is kept transposed; above, oneDNN is as fast or faster."""
EXPECTED_ROWS = 16  # a hint for oneDNN; measured to be as good as any for 2 to 512 rows
DTYPES = (torch.float32, torch.bfloat16)

T = TypeVar("T")


class PackedLinear:
    """Linear layers with the same input as one product, which is row-invariant.

    Args:
        layers: their outputs follow each other in the result. No gradients are computed.
        pack: whether to keep a copy of their weights in oneDNN's order; without, products are slower.

    >>> layers, rows = [nn.Linear(8, 4), nn.Linear(8, 2)], torch.randn(5, 8)
    >>> with torch.no_grad():
    ...     joined = PackedLinear(layers)(rows)
    ...     torch.allclose(joined, torch.cat([layer(rows) for layer in layers], dim=1), atol=1e-5)
    True
    """

    def __init__(self, layers: Sequence[nn.Linear], pack: bool = True) -> None:
        weights = [layer.weight.detach() for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._is_transposed = pack and _should_transpose(weight)
        if self._is_transposed:
            self.weight = weight.t().contiguous()
        else:
            self.weight = _ops()._reorder_linear_weight(weight, EXPECTED_ROWS) if pack else weight
        biases = [_bias(layer).detach() for layer in layers]
        self.bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases)
        self.num_outputs = len(weight)

    def __call__(self, rows: Tensor) -> Tensor:
        """`[M, in]` to `[M, out]`; a row of the result depends on that row alone, bit for bit."""
        num_rows = rows.shape[0]
        if num_rows == 0:
            return rows.new_empty(0, self.num_outputs)
        if num_rows == 1:
            return self._product(rows.expand(2, -1).contiguous())[:1]
        if num_rows <= MAX_PRODUCT_ROWS:
            return self._product(rows)
        return torch.cat([self(part) for part in rows.split(MAX_PRODUCT_ROWS)])

    def whole(self, rows: Tensor) -> Tensor:
        """The same as one product: faster for many rows, but bits depend on their number."""
        return self._product(rows)

    def _product(self, rows: Tensor) -> Tensor:
        if self._is_transposed:
            product = rows @ self.weight
            return product if self.bias is None else product.add_(self.bias)
        return _ops()._linear_pointwise(rows, self.weight, self.bias, "none", [], "")


class PackedWeights:
    """Packed copies of linear weights, made when they are first needed and kept for later calls.

    A network holds one, so that packing costs nothing after the first text. A copy follows its weights: when they
    change, it is made again. Copies are not part of the network's state, of its files or of copies of the network.

    >>> layer, rows = nn.Linear(512, 512), torch.randn(4, 512)
    >>> with torch.no_grad(), PackedWeights().in_use(layer):
    ...     packed = layer(rows)
    >>> torch.allclose(packed, nn.functional.linear(rows, layer.weight, layer.bias), atol=1e-5)
    True
    """

    def __init__(self) -> None:
        self._by_layer: WeakKeyDictionary[nn.Module, dict[Hashable, _Copy]] = WeakKeyDictionary()

    def linear(self, *layers: nn.Linear, pack: bool = True) -> PackedLinear:
        """The product with the present weights of layers that share their input; packed if they are not yet.

        Args:
            layers: `is_packable`.
            pack: see `PackedLinear`.
        """
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
        key = (len(layers), pack, torch.get_num_threads())
        return self.copy(layers[0], key, tensors, lambda can_pack: PackedLinear(layers, pack and can_pack))

    def draft_linear(self, *layers: nn.Linear, pack: bool = True) -> PackedLinear | QuantizedLinear:
        """The product of layers whose results matter to drafts alone, by `QuantizedLinear` if they allow it."""
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
        key = ("draft", len(layers), pack)
        return self.copy(layers[0], key, tensors, lambda can_pack: draft_product(layers, pack and can_pack))

    def copy(self, owner: nn.Module, key: Hashable, tensors: Sequence[Tensor], build: Callable[[bool], T]) -> T:
        """What `build` makes of tensors: of their present values, but not again for the same ones.

        Args:
            owner: the copy is dropped with it.
            key: of the copy among those of its owner.
            tensors: what the copy depends on.
            build: gets whether the copy may be kept. Tensors without a version are copied in each call, because a
                change would go unnoticed, as does one through `.data`.
        """
        source = _version(tensors)
        if source is None:
            return build(False)
        copies = self._by_layer.setdefault(owner, {})
        copy = copies.get(key)
        if copy is None or copy.source != source:
            copy = copies[key] = _Copy(build(True), source)
        return copy.value

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """Let the linear layers of a model on a CPU compute row-invariant products inside the block.

        Each layer gets a `forward` of its own, which is removed at the end. It is used where no gradient is wanted;
        results differ from the plain layer's by the order of sums. Weights of models whose copies would take more than
        `MAX_TOTAL_BYTES` are not packed. Other devices and dtypes stay as they are.

        Args:
            model: its weights and `state_dict` are not changed.
        """
        modules = model.modules()
        layers = [layer for layer in modules if isinstance(layer, nn.Linear) and "forward" not in vars(layer)]
        layers = [layer for layer in layers if is_packable(layer)]
        pack = packs_weights(model)
        for layer in layers:
            cast(Any, layer).forward = partial(self._forward, layer, pack)
        try:
            yield
        finally:
            for layer in layers:
                del cast(Any, layer).forward

    def _forward(self, layer: nn.Linear, pack: bool, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.dtype != layer.weight.dtype or not is_packable(layer):
            return F.linear(input, layer.weight, layer.bias)
        rows = input.reshape(-1, input.shape[-1])
        product = self.draft_linear if isinstance(layer, DraftLinear) else self.linear
        return product(layer, pack=pack)(rows).view(*input.shape[:-1], layer.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class _Copy(NamedTuple):
    """A packed copy and the versions of the tensors that it was made of."""

    value: Any
    source: tuple[Any, ...]


def draft_product(layers: Sequence[nn.Linear], pack: bool) -> PackedLinear | QuantizedLinear:
    """The fastest product for drafts; `pack` is whether a copy of the weights may be kept."""
    return QuantizedLinear(layers) if pack and all(map(is_quantizable, layers)) else PackedLinear(layers, pack)


def is_packable(layer: nn.Module) -> bool:
    """Whether a layer is a linear one on a CPU, in float32 or bfloat16, and oneDNN is there.

    >>> is_packable(nn.Linear(8, 8)), is_packable(nn.Linear(8, 8).double())
    (True, False)
    """
    if type(layer) not in (nn.Linear, DraftLinear):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype in DTYPES and _is_available()


def packs_weights(model: nn.Module) -> bool:
    """Whether packed copies of all linear weights of a model take at most `MAX_TOTAL_BYTES`."""
    return sum(layer.weight.nbytes for layer in model.modules() if type(layer) is nn.Linear) <= MAX_TOTAL_BYTES


def _should_transpose(weight: Tensor) -> bool:
    is_small = weight.dtype == torch.float32 and weight.numel() <= MAX_TRANSPOSED_SIZE
    return is_small and _adds_alike(*weight.shape, torch.get_num_threads())


@cache
def _adds_alike(num_outputs: int, num_inputs: int, num_threads: int) -> bool:
    """Whether plain products by a transposed weight have rows with the same bits for each number of rows from two on.

    Where threads share the inputs of a product, they do not.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(MAX_PRODUCT_ROWS, num_inputs, generator=generator)
    weight = torch.randn(num_inputs, num_outputs, generator=generator)
    whole = rows @ weight
    return all(torch.equal(rows[:number] @ weight, whole[:number]) for number in range(2, MAX_PRODUCT_ROWS))


def _version(tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """Addresses and versions; None if they have none, as inference tensors."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


@cache
def _is_available() -> bool:
    """Whether this build of torch has the operators and they work; they are not part of torch's public interface."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad():
            layer, rows = nn.Linear(64, 64, bias=False), torch.arange(128.0).view(2, 64)
            layer.weight.copy_(torch.eye(64))
            return all(torch.equal(PackedLinear([layer.to(dtype)])(rows.to(dtype)), rows.to(dtype)) for dtype in DTYPES)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _ops() -> Any:
    return torch.ops.mkldnn
