"""Storages that cannot be read are refused with their name, and torn ones are repaired."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from ptp_lightning.sweeps.run import open_study
from ptp_lightning.sweeps.storage import drop_torn_line, load_stored, open_storage
from tests.helpers.tiny_study import letters

ROOT = Path(__file__).parents[3]
KILLED_WITH_LOCK = """
import os, signal
from ptp_lightning.sweeps.storage import open_storage
open_storage("deep/study.journal", create=True)._backend._lock.acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
LINE = b'{"op_code":0,"worker_id":"w","study_name":"s","directions":[1]}\n'


def test_a_line_that_was_torn_by_a_dying_process_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(LINE + LINE[:20])
    open_study(letters(), "letters", open_storage(str(path), create=True))
    assert path.read_bytes().startswith(LINE + b'{"op_code":0')
    assert optuna.get_all_study_names(open_storage(str(path), create=False)) == ["s", "letters"]


@pytest.mark.parametrize("content", [b"", LINE, LINE + LINE])
def test_whole_journals_stay(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    drop_torn_line(path)
    assert path.read_bytes() == content


def test_a_lock_whose_holder_was_killed_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the storage is named by a relative path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(JournalFileSymlinkLock.__init__, "__defaults__", (3,))  # seconds of grace, of 30
    storage = open_storage("deep/study.journal", create=True)
    killed = subprocess.run([sys.executable, "-c", KILLED_WITH_LOCK], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert Path("deep/study.journal.lock").is_symlink()
    open_study(letters(), "letters", storage)
    assert optuna.get_all_study_names(storage) == ["letters"]


def test_what_is_no_storage_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("notes\nand more\nand more\n")
    for location in (str(other), str(tmp_path), str(other / "study.journal"), "sqlite:////nowhere/study.db", "odd://x"):
        with pytest.raises(ValueError, match=f"--storage {location}"):
            open_storage(location, create=True)
    assert other.read_text() == "notes\nand more\nand more\n"


def test_what_is_not_there_is_not_made_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    with pytest.raises(FileNotFoundError, match="start one with run"):
        open_storage(str(path), create=False)
    assert not path.exists()
    open_study(letters(), "letters", open_storage(str(path), create=True))
    with pytest.raises(ValueError, match=r"the study 'letters_quick' in the storage, found \['letters'\]"):
        load_stored("letters_quick", open_storage(str(path), create=False))


def test_optunas_own_commands_open_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    open_study(letters(), "letters", open_storage(str(path), create=True))
    command = [sys.executable, "-c", "from optuna.cli import main; main()", "--storage", str(path), "study-names"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "letters"


@pytest.mark.parametrize(
    ("address", "package"),
    [
        ("postgresql://me:secret@host/db", r"psycopg: pip install 'ptp_lightning\[postgresql\]'"),
        ("mysql://me:secret@host/db", "mysqlclient, or another driver as in mysql"),
        ("mysql+pymysql://me:secret@host/db", "pymysql"),
    ],
)
def test_a_missing_driver_is_named(address: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psycopg", "MySQLdb", "pymysql"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"needs the package {package}") as error:
        open_storage(address, create=True)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["odd://me:se%20cret@host/db", "postgresql://me:se@cret@127.0.0.1:9/db", "sqlite://me:se@cret@x/db"]
)
def test_passwords_are_not_shown(address: str) -> None:
    with pytest.raises(ValueError, match=r"--storage \S+://me:\*\*\*@") as error:
        open_storage(address, create=True)
    assert "cret" not in str(error.value)
