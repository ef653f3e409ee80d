"""PhaseTimer: how long each phase of decoding takes."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Literal, get_args

import torch

Phase = Literal["forward", "verifying", "drafting", "bookkeeping"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseTimer:
    """Measures phases of decoding; a decoder marks the end of each.

    | phase | what it is |
    |---|---|
    | forward | the network on tokens and slots |
    | verifying | the base model's output head, its picks, and the comparison with the draft |
    | drafting | the slots' output head, their tokens, and the correction |
    | bookkeeping | all else |

    Args:
        clock: returns seconds.
        device: of the network. On a GPU each mark waits for the device, which takes time of its own.

    Attributes:
        seconds: of each phase so far.

    >>> seconds = iter([0.0, 2.0, 2.5])
    >>> timer = PhaseTimer(clock=lambda: next(seconds))
    >>> timer.mark("forward")
    >>> timer.mark("verifying")
    >>> timer.seconds["forward"], timer.seconds["verifying"]
    (2.0, 0.5)
    """

    def __init__(self, clock: Callable[[], float] = perf_counter, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._clock = clock
        self._synchronizes = device is not None and device.type == "cuda"
        self._last = clock()

    def mark(self, phase: Phase) -> None:
        """Add the time since the last mark to a phase, which ends here."""
        if self._synchronizes:
            torch.cuda.synchronize()
        now = self._clock()
        self.seconds[phase] += now - self._last
        self._last = now
