"""Trainings that a study needs before its first trial, of a teacher for instance; several processes train it once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ptp_lightning.sweeps.study import Overrides, Preparation, path_from_study
from ptp_lightning.sweeps.training_run import fit_arguments, fit_command
from ptp_lightning.utils.file_lock import LOCK_SUFFIX, FileLock

POLL_SECONDS = 0.5


def prepare(preparation: Preparation, study_file: Path, overrides: Overrides, log: Callable[[str], None]) -> None:
    """Run the training of a preparation if its output is missing; wait if another process runs it.

    Args:
        preparation: the training and its output.
        study_file: the study's file.
        overrides: of the study; those below `forwarded_keys` apply to the preparation too.
        log: is called with progress messages.

    Raises:
        ValueError: the training failed, or did not write its output.
    """
    output = Path(preparation.output)
    forwarded = {path: value for path, value in overrides.items() if _is_forwarded(path, preparation)}
    arguments = fit_arguments(path_from_study(study_file, preparation.config), preparation.overrides, forwarded)
    if output.exists() and not output.with_suffix(LOCK_SUFFIX).exists():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock.try_acquire(output)
    if lock is None:
        log(f"waiting for {output}, which another process trains")
    while lock is None:
        time.sleep(POLL_SECONDS)
        lock = FileLock.try_acquire(output)
    try:
        if not output.exists():
            _train(output, arguments, lock, log)
    finally:
        lock.release()


def _is_forwarded(path: str, preparation: Preparation) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in preparation.forwarded_keys)


def _train(output: Path, arguments: list[str], lock: FileLock, log: Callable[[str], None]) -> None:
    command = fit_command(arguments)
    log(f"{output} is missing; training it with\n  {command}")
    training = subprocess.Popen([sys.executable, "-m", "ptp_lightning", "fit", *arguments])
    try:
        while training.poll() is None:
            lock.refresh()
            time.sleep(POLL_SECONDS)
    except BaseException:
        training.terminate()
        training.wait()
        raise
    if training.returncode != 0 or not output.exists():
        raise ValueError(
            f"expected {output}, which the study needs, from the command below, but it was not written:\n  {command}"
        )
