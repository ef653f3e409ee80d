"""The benchmark of growth: slopes are exponents, and a run writes both files."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cost_growth import classify, main, slope


@pytest.mark.parametrize(("exponent", "expected"), [(0, "less"), (0.95, "linear"), (1, "linear"), (1.2, "more")])
def test_slopes_are_exponents(exponent: float, expected: str) -> None:
    found = slope([2, 4, 8, 16], [3 * value**exponent for value in (2, 4, 8, 16)])
    assert found == pytest.approx(exponent)
    assert classify(found) == expected


def test_a_run_prints_slopes_and_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {
        "windows": (16, 32),
        "window_length": (8, 16),
        "row_length": (32, 33),
        "vocab": (64, 128),
        "width": (32, 64),
    }
    small = ["--rows", "1", "--layers", "1", "--rank", "2", "--steps", "1"]
    values = [text for axis, pair in sizes.items() for text in (f"--{axis}", *map(str, pair))]
    monkeypatch.setattr(sys, "argv", ["cost_growth", "--output", str(tmp_path / "growth"), *values, *small])
    main()
    result = json.loads((tmp_path / "growth" / "cost_growth.json").read_text())
    assert (tmp_path / "growth" / "cost_growth.png").read_bytes().startswith(b"\x89PNG")
    assert result["base"] == {axis: pair[1] for axis, pair in sizes.items()}
    # Most memory of a step is saved for N (L - 1) slots, so it is proportional to N.
    growth = {axis: entry["memory_slope"] for axis, entry in result["growth"].items()}
    assert growth["windows"] == pytest.approx(1, abs=0.1)
    assert growth["vocab"] < 0.1
    assert growth["width"] > 0.5
    assert "memory  0.9" in capsys.readouterr().out
