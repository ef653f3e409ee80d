"""Storages of studies: an Optuna journal file, or a database that Optuna opens by its URL."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

JOURNAL = "study.journal"


def open_storage(location: str, *, create: bool) -> BaseStorage:
    """The storage at a URL (`sqlite:///study.db`) or in a journal file.

    Args:
        location: URL or path.
        create: create a missing journal.

    Raises:
        FileNotFoundError: there is no journal, and `create` is false.
        ValueError: it cannot be read or written.
    """
    if "://" in location:
        try:
            return get_storage(location)  # with the cache that studies use
        except Exception as error:  # SQLAlchemy's and its drivers' have no common base
            raise ValueError(f"expected a database that can be opened at --storage {location}: {error}") from error
    # With a relative path Optuna's lock is a dangling link, and waiting processes spin for ever if its holder dies.
    path = Path(location).absolute()
    if not create and not path.exists():
        raise FileNotFoundError(
            f"expected a study's storage at {path}, found none: start one with run, or set --storage"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        with path.open("ab"):
            pass  # can be written
        return JournalStorage(JournalFileBackend(str(path)))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"expected an Optuna journal that can be read and written at --storage {path}, found "
            f"{type(error).__name__}: {error}"
        ) from error


def load_stored(name: str, storage: BaseStorage) -> optuna.Study:
    """A study by its name.

    Raises:
        ValueError: the storage has no study of this name.
    """
    names = sorted(optuna.get_all_study_names(storage))
    if name not in names:
        raise ValueError(f"expected the study {name!r} in the storage, found {names}: set --storage or --full")
    return optuna.load_study(study_name=name, storage=storage)


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, left by a killed process or a full disk; lines after it would be lost."""
    if not path.is_file() or _is_complete(path):
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        if not _is_complete(path):  # another process may have completed it
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _is_complete(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return file.read() in (b"", b"\n")
