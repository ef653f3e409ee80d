"""Tests as rows: each is recorded as soon as it is done."""

from __future__ import annotations

import pytest

from benchmarks.on_a_gpu.rows import LONGEST_REASON, Record, Row


def rows(record: Record, *, options: list[str]) -> None:
    """Run pytest, in this process unless the options say otherwise. What tests print is captured, but for what their
    own processes print.

    Raises:
        RuntimeError: it could not run the tests, or found none.
    """
    status = pytest.main(
        ["-n", "0", "--capture", "sys", "-p", "no:cacheprovider", *options], plugins=[_Recorder(record)]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(status).name}")


class _Recorder:
    """A plugin of pytest.

    Args:
        record: takes the rows.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._seconds: dict[str, float] = {}
        self._said: dict[str, pytest.TestReport] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, the test itself and tear-down, in turn."""
        test = report.nodeid
        self._seconds[test] = self._seconds.get(test, 0.0) + report.duration
        if test not in self._said or report.failed or (not self._said[test].failed and report.when == "call"):
            self._said[test] = report
        if report.when == "teardown":
            said = self._said.pop(test)
            reason = _last_line(said) if said.failed else None
            printed = said.capstdout.strip().splitlines()[-1:]
            figures = {"outcome": said.outcome, "seconds": self._seconds.pop(test), "printed": "".join(printed)}
            self._record(Row(test.removeprefix("tests/"), figures, reason))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Of a file that cannot even be read."""
        if report.failed:
            self._record(Row(report.nodeid, {"outcome": "failed"}, _last_line(report)))


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What pytest says of a failure: the first line that it marks with E, else the last of all."""
    lines = [line for line in report.longreprtext.splitlines() if line.strip()]
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (marked or lines[-1:] or ["no reason was given"])[0][:LONGEST_REASON]
