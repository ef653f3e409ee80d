"""The most memory that a piece of work has in use."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import torch

SAMPLE_SECONDS = 0.02


class PeakMemory:
    """Measures inside a `with` block: memory allocated on a GPU, else the resident memory of this process.

    Resident memory is looked at every 20 ms, so that short peaks can be missed.

    Args:
        device: where the network is.

    Attributes:
        peak_bytes: the most that was in use, once the block has ended.
    """

    def __init__(self, device: torch.device) -> None:
        import psutil

        self._device = device if device.type == "cuda" else None
        self._process = psutil.Process()
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        self.peak_bytes = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._device is not None:
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
