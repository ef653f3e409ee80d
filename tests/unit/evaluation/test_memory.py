"""The peak is of the block, not of what is left at its end."""

import time

import numpy as np
import torch

from ptp_lightning.evaluation.memory import SAMPLE_SECONDS, PeakMemory

MEGABYTE = 2**20


def test_memory_that_is_given_back_counts() -> None:
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    with PeakMemory(torch.device("cpu")) as busy:
        taken = np.ones(256 * MEGABYTE, dtype=np.uint8)
        time.sleep(5 * SAMPLE_SECONDS)
        del taken
    assert busy.peak_bytes - idle.peak_bytes > 200 * MEGABYTE
