"""Two commands that start together on an empty PostgreSQL database share a study, and nothing shows the password."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from ptp_lightning.cli import main
from tests.helpers.forked_process import ForkedProcess, run_command
from tests.helpers.postgres import PASSWORD, find_programs, running_postgres
from tests.helpers.tiny_study import write_study

pytest.importorskip("psycopg", reason="needs pip install 'ptp_lightning[postgresql]'")
PROGRAMS = find_programs()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAMS is None, reason="needs a PostgreSQL server: apt-get install postgresql"),
]


def command_lines_of_children(run: ForkedProcess) -> set[str]:
    """Command lines that all users of the machine see."""
    try:
        return {" ".join(child.cmdline()) for child in psutil.Process(run.pid).children(recursive=True)}
    except psutil.Error:
        return set()


def test_two_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAMS is not None
    study = write_study(tmp_path, seeds=[0, 1])
    with running_postgres(PROGRAMS) as server:
        options = ["run", str(study), "--full", "--storage", server.empty_database()]
        runs = [ForkedProcess(run_command, "sweep", *options, *more, folder=tmp_path) for more in ([], ["--jobs", "2"])]
        seen: set[str] = set()
        try:
            while any(run.poll() is None for run in runs):
                for run in runs:
                    seen |= command_lines_of_children(run)
                time.sleep(0.2)
            outputs = ["".join(run.communicate(timeout=240)) for run in runs]
        finally:
            for run in runs:
                run.kill()
        assert [run.returncode for run in runs] == [0, 0], outputs
        assert "4 trainings" in outputs[0] and "tester:***@127.0.0.1" in outputs[0]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ptp_lightning", "sweep", "report", *options[1:]])
        main()
    assert "| independent |" in capsys.readouterr().out
    assert any("sweep run" in line for line in seen)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in [*outputs, *seen] if PASSWORD in text]
    assert not [content for content in written if PASSWORD.encode() in content]
