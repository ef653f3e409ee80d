"""LiveBytes: the bytes of all tensors that live, while a piece of work makes them and lets them go."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "activations"


class LiveBytes(TorchDispatchMode):
    """Counts, inside a `with` block, what each operation allocates, until the last tensor that reads it is gone.

    It looks at storages, so views count once and tensors that autograd keeps count as long as it keeps them; whether
    there is memory behind them does not matter, so that fake tensors count like real ones. What a kernel needs for
    itself and gives back before it returns is not seen, nor is what an allocator wastes.

    Attributes:
        now: bytes that live, by kind; what was not claimed is `OTHER`.
        peak: `now` when its sum was largest since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kind = OTHER
        self._total = self._peak_total = 0
        # By the address of the storage: its kind, and a reference that says when it is gone.
        self._storages: dict[int, tuple[str, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, self._kind)
        return result

    def claim(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as `kind`, whether they were there before the block or have been counted already."""
        for tensor in tensors:
            found = self._storages.get(tensor.untyped_storage()._cdata)
            if found is None:
                self._count(tensor, kind)
            elif found[0] != kind:
                num_bytes = tensor.untyped_storage().nbytes()
                self.now[found[0]] -= num_bytes
                self.now[kind] += num_bytes
                self._storages[tensor.untyped_storage()._cdata] = (kind, found[1])

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Count what is made inside the block as `kind`."""
        previous, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = previous

    def restart(self) -> None:
        """Look for another peak from here on."""
        self.peak, self._peak_total = Counter(self.now), self._total

    def _count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        num_bytes = storage.nbytes()

        def gone(_: object) -> None:
            self.now[self._storages.pop(address)[0]] -= num_bytes
            self._total -= num_bytes

        self._storages[address] = (kind, weakref.ref(storage, gone))
        self.now[kind] += num_bytes
        self._total += num_bytes
        if self._total > self._peak_total:
            self.restart()
