"""What a study needs before its first trial, a teacher for instance: made once, whoever starts first."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ptp_lightning.sweeps.study import Overrides, Preparation, beside
from ptp_lightning.sweeps.training_run import fit_arguments, fit_command
from ptp_lightning.utils.file_lock import LOCK_SUFFIX, FileLock

POLL_SECONDS = 0.5


def prepare(preparation: Preparation, study_file: Path, overrides: Overrides, say: Callable[[str], None]) -> None:
    """Train what is not there yet; waits where another process does.

    Args:
        preparation: what is needed.
        study_file: whose preparation it is.
        overrides: of the study, from which it takes what is passed on.
        say: is told what happens.

    Raises:
        ValueError: the training failed, or did not make what it should.
    """
    made = Path(preparation.makes)
    passed_on = {path: value for path, value in overrides.items() if _is_passed_on(path, preparation)}
    arguments = fit_arguments(beside(study_file, preparation.config), preparation.overrides, passed_on)
    if made.exists() and not made.with_suffix(LOCK_SUFFIX).exists():
        return
    made.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock.try_acquire(made)
    if lock is None:
        say(f"waiting for {made}, which another process makes")
    while lock is None:
        time.sleep(POLL_SECONDS)
        lock = FileLock.try_acquire(made)
    try:
        if not made.exists():
            _train(made, arguments, lock, say)
    finally:
        lock.release()


def _is_passed_on(path: str, preparation: Preparation) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in preparation.passed_on)


def _train(made: Path, arguments: list[str], lock: FileLock, say: Callable[[str], None]) -> None:
    command = fit_command(arguments)
    say(f"there is no {made} yet; it is made by\n  {command}")
    training = subprocess.Popen([sys.executable, "-m", "ptp_lightning", "fit", *arguments])
    try:
        while training.poll() is None:
            lock.refresh()
            time.sleep(POLL_SECONDS)
    except BaseException:
        training.terminate()
        training.wait()
        raise
    if training.returncode != 0 or not made.exists():
        raise ValueError(
            f"expected {made}, which the study reads, to be made by the command below; it was not:\n  {command}"
        )
