"""Runs a command in the process of the test, and returns its exit status and output."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from ptp_lightning import cli


class CommandOutput(NamedTuple):
    """Exit status, standard output and standard error."""

    status: int
    out: str
    err: str


Run = Callable[..., CommandOutput]

CONTROL_CHARACTERS = {chr(code) for code in range(32)} - {"\n"}
"""What moves the cursor of a terminal or colours it, and makes a log unreadable."""


def run_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> CommandOutput:
    """Run `python -m ptp_lightning` with these arguments."""
    monkeypatch.delenv("PTP_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *args])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    return CommandOutput(status, *capsys.readouterr())
