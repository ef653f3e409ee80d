"""What a command prints when it runs in the test's own process, for tests."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from ptp_lightning import cli


class Printed(NamedTuple):
    """Attributes: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


Run = Callable[..., Printed]


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> Printed:
    """`python -m ptp_lightning` with these arguments."""
    monkeypatch.delenv("PTP_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *args])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    return Printed(status, *capsys.readouterr())
