"""One text at a time: calls of one network from several threads wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def exclusive(network: nn.Module) -> Iterator[None]:
    """Wait until no other thread is in such a block of the same network.

    The gate of the adapter and what decoding changes in a network are states of the network. The lock is not an
    attribute of it, because modules with locks cannot be copied or pickled.
    """
    with _locks_lock:
        lock = _locks.setdefault(network, threading.RLock())
    with lock:
        yield
