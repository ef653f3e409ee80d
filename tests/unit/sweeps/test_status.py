"""The line on how far a study is."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ptp_lightning.sweeps.attributes import HEARTBEAT, HEARTBEAT_STEP, SECONDS, SHARED_STEPS, START_STEP, STEPS
from ptp_lightning.sweeps.budget import STEPS_KEY
from ptp_lightning.sweeps.command import status
from ptp_lightning.sweeps.queue import TrialQueue
from ptp_lightning.sweeps.status import status_line
from ptp_lightning.sweeps.storage import open_storage
from ptp_lightning.sweeps.worker import suggest
from tests.unit.sweeps.test_budget import at_steps, queue_of
from tests.unit.sweeps.test_queue import (
    abandon,
    dead,  # noqa: F401  a fixture
)


def finish(queue: TrialQueue, seconds_per_step: float) -> None:
    """A result of half of whose steps longer trainings have in common."""
    trial = queue.take()
    assert trial is not None
    chosen = {name: suggest(trial, name, one) for name, one in queue.study.distributions.items()}
    steps = chosen[STEPS_KEY]
    assert isinstance(steps, int)
    for name, value in (STEPS, steps), (SECONDS, steps * seconds_per_step), (SHARED_STEPS, steps // 2):
        trial.set_user_attr(name, value)
    queue.stored.tell(trial, 1.0)


def line(folder: Path) -> str:
    study = at_steps(200, 800, seeds=(0,))
    return status_line(study, "letters", open_storage(str(folder / "study.journal"), create=False, read_only=True))


def test_a_study_from_its_start_to_its_end(tmp_path: Path) -> None:
    queue = queue_of(at_steps(200, 800, seeds=(0,)), tmp_path)
    assert line(tmp_path) == "0 of 4 done, 0 running, 4 waiting, 0 failed"
    finish(queue, seconds_per_step=1.0)  # a
    # b is as long; those of 800 steps begin with 100 of the 200.
    assert line(tmp_path) == (
        "1 of 4 done, 0 running, 3 waiting, 0 failed; no process works on it, one would take 26 min 40 s"
    )
    finish(queue, seconds_per_step=3.0)  # b
    assert line(tmp_path).endswith("one would take 46 min 40 s")  # 700 s of a and 2100 s of b
    running = queue.take()
    assert running is not None
    running.set_user_attr(START_STEP, 200)
    found = line(tmp_path)
    assert found.startswith("2 of 4 done, 1 running, 1 waiting, 0 failed; ")
    assert "; 45 min 00 s left, the next result about" in found.replace("44 min 59 s", "45 min 00 s")
    times = {f"{datetime.now() + timedelta(seconds=second):%H:%M}" for second in (598, 600)}
    assert found[-5:] in times
    # Its own pace: 100 steps in the 400 seconds until its last heartbeat.
    assert running.datetime_start is not None
    running.set_user_attr(HEARTBEAT_STEP, 300)
    running.set_user_attr(HEARTBEAT, running.datetime_start.timestamp() + 400)
    assert "; 1 h 15 min left" in line(tmp_path).replace("1 h 14 min", "1 h 15 min")  # 2400 s, and 2100 s of b
    queue.stored.tell(running, 1.0)
    last = queue.take()
    assert last is not None
    queue.stored.tell(last, 1.0)
    assert line(tmp_path) == "4 of 4 done, 0 running, 0 waiting, 0 failed"


def test_what_a_dead_process_left_waits(tmp_path: Path, dead) -> None:  # noqa: F811
    queue = queue_of(at_steps(200, 800, seeds=(0,)), tmp_path)
    finish(queue, seconds_per_step=1.0)
    abandon(queue, dead)
    assert line(tmp_path).startswith("1 of 4 done, 0 running, 3 waiting, 0 failed; no process works on it")


def test_the_command_reads_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "letters.yaml"
    file.write_text("title: t\nbase: x.yaml\nbudget: {steps: 4, tokens: 8}\nvariants: {x: {a: {}, b: {}}}\n")
    with pytest.raises(FileNotFoundError, match="a study's storage"):
        status([str(file), "--full", "--output", str(tmp_path)])
    assert not (tmp_path / "study.journal").exists()
    queue_of(at_steps(200, 800, seeds=(0,)), tmp_path)
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "torn')  # another process is writing
    journal.chmod(0o444)
    before = journal.read_bytes()
    status([str(file), "--full", "--output", str(tmp_path)])
    assert capsys.readouterr().out == "letters: 0 of 2 done, 0 running, 2 waiting, 0 failed\n"
    assert journal.read_bytes() == before
