"""Modules and steps without memory: the real code, on tensors that have shapes and no values.

A module is built on torch's meta device. Its step then runs on fake tensors that claim to be on a CPU, because only
there autocast and fused attention act as they do in earnest. Weights and activations are never allocated.

Nothing can be looked up in a tensor without values. The few places where the code does are answered as a step answers
them in which all is in order and everything takes part: checks pass, nothing is tied, no slot is masked. So what a
step needs is never estimated too low where a mask decides.
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
def building() -> Iterator[None]:
    """Modules that are made inside the block have no memory."""
    with torch.device("meta"), _Answers(), _Attributes(on_gpu=False):
        yield


@contextmanager
def running(module: nn.Module, *, on_gpu: bool) -> Iterator[None]:
    """A module of `building` can run inside the block, on tensors that are made there.

    Args:
        module: its parameters and buffers are replaced.
        on_gpu: take the ways that the code takes on a GPU, where it asks tensors whether they are on one.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tables that are part of no module are real
    _replace(module, mode)
    with mode, _Answers(), _Attributes(on_gpu=on_gpu):
        yield


def _replace(module: nn.Module, mode: FakeTensorMode) -> None:
    """Fake tensors in the place of meta tensors; tied ones stay tied."""
    fakes: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id is not used again

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            made: Tensor = FakeTensor(mode, tensor.detach(), CPU)
            is_parameter = isinstance(tensor, nn.Parameter)
            made = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
            fakes[id(tensor)] = (tensor, made)
        return fakes[id(tensor)][1]

    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers, vars(part)]  # metrics keep sums in the last
        for table in tables:
            table.update({name: fake(entry) for name, entry in table.items() if isinstance(entry, Tensor)})


class _Answers(TorchDispatchMode):
    """Answers for operations whose result depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self._exceptions = WeakIdKeyDictionary()  # results of `any`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the module's docstring."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].dtype == torch.bool:
                return args[0] not in self._exceptions
            return 0.5 if args[0].is_floating_point() else 1  # may be a share
        if func in EQUAL:
            return True
        if func is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func is aten.masked_select.default:
            return args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
        if func is aten.bincount.default:  # no number reaches the least length
            return args[0].new_empty(args[2], dtype=torch.int64)
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            kwargs = kwargs | {"device": args[0].device}
        if func in INDEXING:
            args = (args[0], _all_places(args[1]), *args[2:])
        result = func(*args, **kwargs)
        if func in ANY:
            self._exceptions[result] = None
        return result


def _all_places(index: list[Tensor | None]) -> list[Tensor | None]:
    """An index with every bool mask replaced by as many integers as it has entries."""
    places: list[Tensor | None] = []
    for entry in index:
        if entry is not None and entry.dtype == torch.bool:
            places += [entry.new_empty(entry.numel(), dtype=torch.int64) for _ in range(entry.ndim)]
        else:
            places.append(entry)
    return places


class _Attributes(TorchFunctionMode):
    """Answers for what is asked of a tensor itself."""

    def __init__(self, *, on_gpu: bool) -> None:
        super().__init__()
        self._on_gpu = on_gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Numbers are zeros; where the tensor is, see `running`."""
        if func == Tensor.numpy:
            return np.zeros(args[0].shape)
        if self._on_gpu and func == Tensor.is_cuda.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return True
        return func(*args, **(kwargs or {}))
