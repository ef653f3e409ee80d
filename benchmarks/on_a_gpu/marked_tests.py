"""Runs tests and records each as a row as soon as it has finished."""

from __future__ import annotations

import pytest

from benchmarks.on_a_gpu.rows import MAX_REASON_LENGTH, Record, Row


def rows(record: Record, *, options: list[str]) -> None:
    """Run pytest, by default in this process. The output of tests is captured, except that of their child processes.

    Raises:
        RuntimeError: pytest could not run the tests, or found none.
    """
    status = pytest.main(
        ["-n", "0", "--capture", "sys", "-p", "no:cacheprovider", *options], plugins=[_Recorder(record)]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(status).name}")


class _Recorder:
    """A pytest plugin.

    Args:
        record: receives the rows.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._seconds: dict[str, float] = {}
        self._reports: dict[str, pytest.TestReport] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for set-up, call and tear-down of each test."""
        test = report.nodeid
        self._seconds[test] = self._seconds.get(test, 0.0) + report.duration
        if test not in self._reports or report.failed or (not self._reports[test].failed and report.when == "call"):
            self._reports[test] = report
        if report.when == "teardown":
            outcome = self._reports.pop(test)
            reason = _failure_line(outcome) if outcome.failed else None
            printed = outcome.capstdout.strip().splitlines()[-1:]
            figures = {"outcome": outcome.outcome, "seconds": self._seconds.pop(test), "printed": "".join(printed)}
            self._record(Row(test.removeprefix("tests/"), figures, reason))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Called for each collected file."""
        if report.failed:
            self._record(Row(report.nodeid, {"outcome": "failed"}, _failure_line(report)))


def _failure_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The first line of a failure that pytest marks with E, or else the last line."""
    lines = [line for line in report.longreprtext.splitlines() if line.strip()]
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (marked or lines[-1:] or ["no reason given"])[0][:MAX_REASON_LENGTH]
