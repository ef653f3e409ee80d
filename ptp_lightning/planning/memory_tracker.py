"""MemoryTracker: the bytes of all live tensors while code runs, by category.

`torch.distributed._tools.mem_tracker.MemTracker` counts in the same way, and on the configurations of
`tests/unit/planning/test_step_memory.py` it finds the same bytes. It is not used here, because (torch 2.13) it raises
an error for frozen parameters and for `torch.autograd.grad` in the forward pass, which the chunked losses need; it has
no peak per stage of a step; and it is private. `FSDPMemTracker` fails for the same reason.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"


class MemoryTracker(TorchDispatchMode):
    """Counts, inside a `with` block, the memory of each tensor until the last reference to its storage is gone.

    Views share the storage of their base and are counted once. Tensors saved by autograd are counted as long as they
    are saved. Fake tensors are counted like real ones. Workspaces of kernels and fragmentation of the allocator are not
    counted.

    Attributes:
        current: live bytes by category; `ACTIVATIONS` is everything without another category.
        peak: `current` when its sum was largest since the last `reset_peak`.

    >>> import torch
    >>> with MemoryTracker() as tracker:
    ...     total = torch.zeros(10).sum()
    >>> tracker.current["activations"], tracker.peak["activations"]
    (4, 44)
    """

    def __init__(self) -> None:
        super().__init__()
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._category = ACTIVATIONS
        self._total = self._peak_total = 0
        # By address of the storage: its category, and a weak reference with a callback when it is freed.
        self._storages: dict[int, tuple[str, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its outputs."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, self._category)
        return result

    def assign(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors in a category, including tensors that were created before the block."""
        for tensor in tensors:
            found = self._storages.get(tensor.untyped_storage()._cdata)
            if found is None:
                self._count(tensor, category)
            elif found[0] != category:
                num_bytes = tensor.untyped_storage().nbytes()
                self.current[found[0]] -= num_bytes
                self.current[category] += num_bytes
                self._storages[tensor.untyped_storage()._cdata] = (category, found[1])

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Count the tensors created inside the block in this category."""
        previous, self._category = self._category, name
        try:
            yield
        finally:
            self._category = previous

    def reset_peak(self) -> None:
        """Set the peak to the current memory."""
        self.peak, self._peak_total = Counter(self.current), self._total

    def _count(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        num_bytes = storage.nbytes()

        def on_free(_: object) -> None:
            self.current[self._storages.pop(address)[0]] -= num_bytes
            self._total -= num_bytes

        self._storages[address] = (category, weakref.ref(storage, on_free))
        self.current[category] += num_bytes
        self._total += num_bytes
        if self._total > self._peak_total:
            self.reset_peak()
