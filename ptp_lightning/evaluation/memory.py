"""PeakMemory: the peak memory of a block of code."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import torch

SAMPLE_SECONDS = 0.02


class PeakMemory:
    """Measures inside a `with` block the memory allocated on a GPU, or else the resident memory of this process.

    Resident memory is sampled every 20 ms, so short peaks can be missed.

    Args:
        device: of the network.

    Attributes:
        peak_bytes: peak memory, after the block.
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
        self._thread = threading.Thread(target=self._sample_repeatedly, daemon=True)
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
        self._sample()

    def _sample_repeatedly(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
