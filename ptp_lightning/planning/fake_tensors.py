"""Modules and training steps without memory: the real code, run on tensors that have shapes and no values.

A module is built on torch's meta device. Its step then runs on fake tensors of device `cpu`, because only there
autocast and fused attention behave as in a real run. Weights and activations are never allocated.

Values of fake tensors cannot be read. Where the code reads values, they are replaced by those of a step in which all
checks pass, no two values are equal, and no slot is masked. So memory that depends on a mask is never underestimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
CPU = torch.device("cpu")
ANY = (aten.any.default, aten.any.dim, aten.any.dims)
EQUAL = (aten.allclose.default, aten.equal.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


@contextmanager
def meta_modules() -> Iterator[None]:
    """Modules created inside the block are on the meta device."""
    with torch.device("meta"), _AssumedValues(), _Attributes(on_gpu=False):
        yield


@contextmanager
def fake_execution(module: nn.Module, *, on_gpu: bool) -> Iterator[None]:
    """Inside the block, a module created by `meta_modules` can run on tensors that are created there.

    Args:
        module: its parameters and buffers are replaced by fake tensors.
        on_gpu: let `Tensor.is_cuda` be true, so that code takes its paths for GPUs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tensors outside modules are real
    _replace(module, mode)
    with mode, _AssumedValues(), _Attributes(on_gpu=on_gpu):
        yield


def _replace(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta tensors by fake tensors; tied tensors stay tied."""
    fakes: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id is not reused

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            made: Tensor = FakeTensor(mode, tensor.detach(), CPU)
            is_parameter = isinstance(tensor, nn.Parameter)
            made = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
            fakes[id(tensor)] = (tensor, made)
        return fakes[id(tensor)][1]

    for part in module.modules():
        tables: list[dict[str, Any]] = [
            part._parameters,
            part._buffers,
            vars(part),
        ]  # metrics store their sums as attributes
        for table in tables:
            table.update({name: fake(entry) for name, entry in table.items() if isinstance(entry, Tensor)})


class _AssumedValues(TorchDispatchMode):
    """Results of operations that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self._any_results = WeakIdKeyDictionary()  # outputs of `any`, which are false

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the module's docstring."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].dtype == torch.bool:
                return args[0] not in self._any_results
            return 0.5 if args[0].is_floating_point() else 1  # may be a fraction
        if func in EQUAL:
            return True
        if func is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func is aten.masked_select.default:
            return args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        if func is aten.bincount.default:  # no value reaches `minlength`
            return args[0].new_empty(args[2], dtype=torch.int64)
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            kwargs = kwargs | {"device": args[0].device}
        if func in INDEXING:
            args = (args[0], _all_selected(args[1]), *args[2:])
        result = func(*args, **kwargs)
        if func in ANY:
            self._any_results[result] = None
        return result


def _all_selected(index: list[Tensor | None]) -> list[Tensor | None]:
    """An index with every bool mask replaced by integers, as if it selected all entries."""
    indices: list[Tensor | None] = []
    for entry in index:
        if entry is not None and entry.dtype == torch.bool:
            indices += [entry.new_empty(entry.numel(), dtype=torch.int64) for _ in range(entry.ndim)]
        else:
            indices.append(entry)
    return indices


class _Attributes(TorchFunctionMode):
    """Results of attributes and methods of tensors."""

    def __init__(self, *, on_gpu: bool) -> None:
        super().__init__()
        self._on_gpu = on_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Zeros for `numpy`; `is_cuda` as given."""
        if func == Tensor.numpy:
            return np.zeros(args[0].shape)
        if self._on_gpu and func == Tensor.is_cuda.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return True
        return func(*args, **(kwargs or {}))
