"""PhaseTimer: where the time of decoding goes."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Literal, get_args

import torch

Phase = Literal["forward", "verifying", "drafting", "bookkeeping"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseTimer:
    """A stopwatch that decoders press at the end of each phase.

    Forward is the network over tokens and slots; verifying, the base model's output head, its picks, and their
    comparison with the draft; drafting, the slots' output head, picks and refiner; bookkeeping is all else.

    Args:
        clock: gives seconds.
        device: where the network is; on a GPU every lap waits for it, which costs time of its own.

    Attributes:
        seconds: of each phase so far.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._clock = clock
        self._waits = device is not None and device.type == "cuda"
        self._last = clock()

    def mark(self, phase: Phase) -> None:
        """What has passed since the last lap was this."""
        if self._waits:
            torch.cuda.synchronize()
        now = self._clock()
        self.seconds[phase] += now - self._last
        self._last = now
