"""What happens if a process of a data loader is killed: an error between two items, in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.utils.data import DataLoader

KILLED = "DataLoader worker"
"""How torch's errors about its processes begin; those within a process are raised as what they are."""

Item = TypeVar("Item", covariant=True)


def loaded_items(loader: DataLoader[Item]) -> Iterator[Item]:
    """The items of a data loader.

    torch raises the end of a process wherever the main process is, also between the updates of two weights, and a
    checkpoint that is written then would be half a step ahead. Here it is raised when the next item is asked for.

    Raises:
        ChildProcessError: a process was killed.
    """
    items = iter(loader)
    with _deferred_check() as check:
        while True:
            try:
                check()
                item = next(items)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith(KILLED):
                    raise
                reason = " ".join(str(error).split()).rstrip(" .")
                raise ChildProcessError(
                    f"expected the processes that prepare data to go on, found: {reason}. The system kills processes "
                    "when memory runs out: lower data.num_workers or data.shuffle_documents; --ckpt_path last goes on"
                ) from error
            yield item


@contextmanager
def _deferred_check() -> Iterator[Callable[[], object]]:
    """A function that raises torch's error if a process has been killed, instead of the signal that does it anywhere.

    Outside the main thread, and on systems without this signal, it does nothing: torch looks after its processes every
    few seconds while it waits for an item.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield lambda: None
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler):  # there is no process, or another loader has deferred the check already
        yield lambda: None
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield lambda: handler(signal.SIGCHLD, None)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
