"""Lines of progress: when they are printed, and the remaining time."""

import pytest

from ptp_lightning.utils import progress_lines
from ptp_lightning.utils.progress_lines import LinePacer


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def look(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_lines.time, "monotonic", clock.look)
    return clock


def test_a_line_is_due_after_some_time_or_progress(clock: Clock) -> None:
    pacer = LinePacer(every_seconds=30, every_fraction=0.25)
    times = {0.1: 10, 0.2: 20, 0.3: 25, 0.35: 40, 0.4: 55, 0.7: 60, 0.9: 70, 1.0: 71}
    due = []
    for fraction, seconds in times.items():
        clock.seconds = seconds
        if pacer.is_due(fraction):
            due.append(fraction)
    assert due == [0.3, 0.4, 0.7, 1.0]  # progress, time, progress, the end
    assert not pacer.is_due(1.0)


def test_a_line_during_other_work_is_due_after_some_time_and_leaves_the_progress(clock: Clock) -> None:
    pacer = LinePacer(every_seconds=30, every_fraction=0.25)
    due = []
    for clock.seconds in (20, 40, 60, 75):
        if pacer.is_due_by_time():
            due.append(clock.seconds)
    assert due == [40, 75]
    assert pacer.is_due(0.25)


def test_the_remaining_time_does_not_count_what_was_done_before(clock: Clock) -> None:
    pacer = LinePacer()
    pacer.start(0.5)
    clock.seconds = 60
    assert pacer.time_left(0.5) == "unknown time left"
    assert pacer.time_left(0.75) == "1 min 00 s left"
    assert pacer.time_left(1.0) == "0 s left"
