"""PeakMemory measures the peak in a block, not the memory at its end."""

import time

import numpy as np
import torch

from ptp_lightning.evaluation.memory import SAMPLE_SECONDS, PeakMemory

MEGABYTE = 2**20


def test_freed_memory_counts() -> None:
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    with PeakMemory(torch.device("cpu")) as busy:
        allocated = np.ones(256 * MEGABYTE, dtype=np.uint8)
        time.sleep(5 * SAMPLE_SECONDS)
        del allocated
    assert busy.peak_bytes - idle.peak_bytes > 200 * MEGABYTE
