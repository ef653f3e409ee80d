"""Storages of studies: an Optuna journal file, or a database that Optuna opens by its URL."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from urllib.parse import unquote

import optuna
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from ptp_lightning.utils.passwords import HIDDEN, without_passwords

JOURNAL = "study.journal"

POSTGRESQL = re.compile(r"^postgres(ql)?://")  # without a driver: psycopg 3, whatever SQLAlchemy takes by default
PACKAGES = {
    "postgresql+psycopg": "psycopg: pip install 'ptp_lightning[postgresql]'",
    "mysql": "mysqlclient, or another driver as in mysql+pymysql://",
}
"""What to install, by the beginning of an address; for others, the error of the import says it."""

CREATED_BY_ANOTHER = re.compile("already exists|duplicate key|UniqueViolation|UNIQUE constraint|Duplicate entry")
MAX_ATTEMPTS = 8
FIRST_PAUSE_SECONDS = 0.05


def open_storage(location: str, *, create: bool, read_only: bool = False) -> BaseStorage:
    """The storage at a URL (`sqlite:///study.db`) or in a journal file.

    Args:
        location: URL or path.
        create: create a missing journal.
        read_only: leave a journal as it is, also an incomplete last line, which another process may be writing.

    Raises:
        FileNotFoundError: there is no journal, and `create` is false.
        ImportError: the database needs a driver that is not installed; names it.
        ValueError: it cannot be read or written.
    """
    if "://" in location:
        return open_database(location)
    # With a relative path Optuna's lock is a dangling link, and waiting processes spin for ever if its holder dies.
    path = Path(location).absolute()
    if not create and not path.exists():
        raise FileNotFoundError(
            f"expected a study's storage at {path}, found none: start one with run, or set --storage"
        )
    try:
        if not read_only:
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


def open_database(address: str) -> BaseStorage:
    """The storage in a database; errors as in `open_storage`, without the password of the address."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    address = POSTGRESQL.sub("postgresql+psycopg://", address)
    for attempt in range(MAX_ATTEMPTS):
        try:
            return get_storage(address)  # with the cache that studies use
        except ImportError as error:
            raise _missing_driver(address, error) from None
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            # Another process creates the tables of an empty database at the same time.
            if attempt + 1 == MAX_ATTEMPTS or not CREATED_BY_ANOTHER.search(str(error)):
                raise _unreadable(address, error) from None
            time.sleep(random.uniform(0, 2**attempt * FIRST_PAUSE_SECONDS))
        except Exception as error:  # those of Optuna, SQLAlchemy and the drivers have no common base
            raise _unreadable(address, error) from None
    raise AssertionError("the last attempt returns or raises")


def _missing_driver(address: str, error: ImportError) -> ImportError:
    scheme = address.partition("://")[0]
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
    package = PACKAGES.get(scheme, f"{cause.name or cause}")
    return ImportError(f"--storage {scheme}://.. needs the package {package}")


def _unreadable(address: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).partition("(Background on")[0].split())
    for secret in _secrets(address):
        reason = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, reason)
    return ValueError(
        f"expected a database that can be opened at --storage {without_passwords(address)}, found "
        f"{type(error).__name__}: {without_passwords(reason)}"
    )


def _secrets(address: str) -> list[str]:
    """The password of an address, as it is written there and as the server gets it; long ones first.

    Its parts as well: an @ that is not written as %40 ends a password for SQLAlchemy, and the rest is taken for a host.
    """
    found = re.search(r"://[^\s:/@]*:([^\s/]*)@", address)
    if found is None:
        return []
    whole = {found[1], unquote(found[1])}
    return sorted((whole | {part for text in whole for part in text.split("@")}) - {""}, key=len, reverse=True)


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
