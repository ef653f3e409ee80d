"""Lines of text that report progress where there is no terminal for a progress bar."""

from __future__ import annotations

import sys
import time

from ptp_lightning.utils.durations import duration_text


class LinePacer:
    """Says when the next line is due: after some time, or after some progress, whichever comes first.

    Args:
        every_seconds: time between two lines.
        every_fraction: progress between two lines, as a fraction of all work.

    Raises:
        ValueError: one of them is not positive.
    """

    def __init__(self, every_seconds: float = 30.0, every_fraction: float = 0.05) -> None:
        if min(every_seconds, every_fraction) <= 0:
            raise ValueError(
                f"expected every_seconds > 0 and every_fraction > 0, found {every_seconds} and {every_fraction}"
            )
        self.every_seconds = every_seconds
        self.every_fraction = every_fraction
        self.start()

    def start(self, fraction: float = 0.0) -> None:
        """Begin with this fraction of the work done."""
        self._first_fraction = self._line_fraction = fraction
        self._begin = self._line_time = time.monotonic()

    def is_due(self, fraction: float) -> bool:
        """Whether a line is due when this fraction of the work is done; the next one is due later."""
        now = time.monotonic()
        progress = fraction - self._line_fraction
        is_complete = fraction >= 1 and progress > 0
        # Fractions are rounded, and a line must not be late for that.
        if now - self._line_time < self.every_seconds and progress < self.every_fraction - 1e-9 and not is_complete:
            return False
        self._line_time, self._line_fraction = now, fraction
        return True

    def is_due_by_time(self) -> bool:
        """Whether a line is due during work that is no part of the progress."""
        now = time.monotonic()
        if now - self._line_time < self.every_seconds:
            return False
        self._line_time = now
        return True

    def time_left(self, fraction: float) -> str:
        """The remaining time at the mean speed since the start, for instance "12 min 30 s left"."""
        done = fraction - self._first_fraction
        if done <= 0:
            return "unknown time left"
        seconds = (time.monotonic() - self._begin) * (1 - fraction) / done
        return f"{duration_text(seconds)} left"


def print_line(*parts: str) -> None:
    """Print the parts of a line to standard error at once."""
    print(", ".join(parts), file=sys.stderr, flush=True)
