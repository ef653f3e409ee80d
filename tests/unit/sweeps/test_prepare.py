"""A preparation is trained once, by the command that is shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from ptp_lightning.sweeps import prepare as preparing
from ptp_lightning.sweeps.prepare import prepare
from ptp_lightning.sweeps.study import Preparation
from ptp_lightning.utils.file_lock import FileLock

STUDY = Path("sweeps/x.yaml")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Programs that were started; each makes the file `teacher`."""
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> "subprocess.Popen[bytes]":
        commands.append(command)
        return popen([sys.executable, "-c", "open('teacher', 'w')"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparing.subprocess, "Popen", start)
    monkeypatch.setattr(preparing, "POLL_SECONDS", 0.01)
    return commands


def test_it_is_trained_with_forwarded_overrides(started: list[list[str]]) -> None:
    messages: list[str] = []
    preparation = Preparation("teacher", "../configs/t.yaml", {"trainer.max_steps": 3}, forwarded_keys=["data.series"])
    study_overrides = {"data.series": "S", "data.series.init_args.path": "p.csv", "data.seriesly": 1, "model.a": 2}
    prepare(preparation, STUDY, study_overrides, messages.append)
    arguments = ["--trainer.max_steps=3", "--data.series=S", "--data.series.init_args.path=p.csv"]
    assert started == [[sys.executable, "-m", "ptp_lightning", "fit", "--config", "configs/t.yaml", *arguments]]
    assert f"python -m ptp_lightning fit --config configs/t.yaml {' '.join(arguments)}" in messages[0]
    assert not list(Path().glob("*.lock"))
    prepare(preparation, STUDY, study_overrides, messages.append)
    assert len(started) == 1  # it is there


def test_it_is_waited_for_while_another_process_makes_it(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FileLock.try_acquire(Path("teacher"))
    assert lock is not None
    messages: list[str] = []
    Path("teacher").touch()  # half of it is there

    def release(_: float) -> None:
        lock.release()

    monkeypatch.setattr(preparing.time, "sleep", release)
    prepare(Preparation("teacher", "t.yaml"), STUDY, {}, messages.append)
    assert messages == ["waiting for teacher, which another process trains"]
    assert started == []


def test_a_training_that_does_not_make_it_is_an_error_with_its_command(started: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="expected other, which the study needs, .*\n.*fit --config sweeps/t.yaml"):
        prepare(Preparation("other", "t.yaml"), STUDY, {}, lambda _: None)
    assert not list(Path().glob("*.lock"))
