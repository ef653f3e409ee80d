"""Processes of a data loader that are killed, or that fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, IterableDataset

from ptp_lightning.data.streaming.worker_processes import loaded_items


class Numbers(IterableDataset[int]):
    """0, 1, 2, .., and after `limit` of them an error as torch might raise it."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit = limit

    def __iter__(self) -> Iterator[int]:
        yield from range(self.limit)
        raise RuntimeError("out of numbers")


def loader(numbers: Numbers) -> DataLoader[int]:
    return DataLoader(numbers, batch_size=None, num_workers=1)


def test_a_killed_process_is_an_error_of_the_next_item_in_one_line() -> None:
    items = loaded_items(loader(Numbers()))
    assert next(items) == 0
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # here torch's own handler would raise
    with pytest.raises(ChildProcessError, match=r"^[^\n]*killed by signal: Killed\.[^\n]*data\.num_workers[^\n]*$"):
        list(items)


def test_the_signal_handler_is_that_of_torch_again() -> None:
    next(iter(loader(Numbers())))  # a user's own loader
    before = signal.getsignal(signal.SIGCHLD)
    assert callable(before)
    items = loaded_items(loader(Numbers()))
    next(items)
    assert signal.getsignal(signal.SIGCHLD) != before
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert signal.getsignal(signal.SIGCHLD) == before


def test_an_error_within_a_process_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="out of numbers"):
        list(loaded_items(loader(Numbers(limit=2))))
