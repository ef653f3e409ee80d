"""The notebooks run from top to bottom, and their results are correct; in git they have no outputs."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
CELL_TIMEOUT = 200  # seconds


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One for all notebooks, in their folder: apart, each would spend most of its time on the same imports.

    They leave nothing there.
    """
    before = set(FOLDER.iterdir())
    manager, client = start_new_kernel(cwd=str(FOLDER), extra_arguments=["--HistoryManager.enabled=False"])
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)
    assert set(FOLDER.iterdir()) - before <= {FOLDER / "runs"}


def read(name: str) -> NotebookNode:
    """A notebook as it lies in the repository."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def run(name: str, kernel: KernelManager, parameters: dict[str, Any], expressions: list[str]) -> list[Any]:
    """Execute a notebook, with nothing left of the one before it.

    Args:
        name: of its file.
        kernel: runs it.
        parameters: are assigned after the cell with the tag `parameters`, which must assign the same names.
        expressions: are evaluated after the last cell.

    Returns:
        Their values, as JSON gives them back.
    """
    notebook = read(name)
    (place,) = (place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    for key in parameters:
        assert f"{key} = " in notebook.cells[place].source
    assignments = new_code_cell("\n".join(f"{key} = {value!r}" for key, value in parameters.items()))
    look = new_code_cell(f"import json\nprint(json.dumps([{', '.join(expressions)}]))")
    before, after = notebook.cells[: place + 1], notebook.cells[place + 1 :]
    notebook.cells = [new_code_cell("%reset -f"), *before, assignments, *after, look]
    NotebookClient(notebook, km=kernel, timeout=CELL_TIMEOUT).execute()
    # A kernel under load may send one line in several messages.
    return json.loads("".join(output.text for output in look.outputs if output.name == "stdout"))


@pytest.mark.parametrize("name", NAMES)
def test_no_results_in_git(name: str) -> None:
    """They would make changes unreadable; `nbstripout --keep-id`, a hook of pre-commit, takes them away."""
    for cell in read(name).cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert cell.metadata.keys() <= {"tags"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_imported_exist(name: str) -> None:
    """Of all notebooks, those that only slow tests execute included."""
    for cell in read(name).cells:
        if cell.cell_type == "code" and not cell.source.lstrip().startswith("%%"):
            lines = [line for line in cell.source.splitlines() if not line.startswith(("%", "!"))]
            parsed = ast.parse("\n".join(lines))
            parsed.body = [node for node in parsed.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(parsed, name, "exec"), {})


@pytest.mark.slow  # the theorems are counted in tests/unit/test_auxiliary.py, trainings in tests/integration
def test_the_method(kernel: KernelManager) -> None:
    """The theorems hold by counting, and networks come nearer to them in one call than any independent prediction."""
    expressions = ["num_lost", "theorem_1_deviation", "theorem_2_deviation", "list(correct.values())"]
    expressions += ["measured['categorical']", "measured['independent']", "floor[1:].tolist()"]
    num_lost, theorem_1, theorem_2, correct, categorical, independent, floor = run(
        "1_the_method", kernel, {"NUM_STEPS": 60, "RESOLUTION": 30}, expressions
    )
    assert (num_lost, theorem_1) == (0, 0.0)
    assert theorem_2 < 0.015  # four standard errors of a share among 20 000
    autoregressive, c_ptp, o_ptp, mtp = correct
    assert autoregressive == 1.0
    assert min(c_ptp, o_ptp) > 0.65 > mtp  # after few steps: 0.75 and 0.86 against 0.56
    assert independent == pytest.approx(floor, abs=0.08)
    assert all(nats < least for nats, least in zip(categorical, floor, strict=True))


def test_accuracy_per_position(kernel: KernelManager, tmp_path: Path) -> None:
    expressions = [
        "identity_error",
        "[read_positions(run, 'val/accuracy_given_prefix')[1][-1].tolist() for run in folders]",
    ]
    expressions += ["[read_curve(run, 'val/correct_tokens')[1].tolist() for run in folders]"]
    identity_error, given_prefix, correct = run(
        "2_accuracy_per_position",
        kernel,
        {"NUM_STEPS": 30, "NUM_VALIDATIONS": 2, "RUNS": str(tmp_path)},
        expressions,
    )
    assert identity_error < 1e-5
    assert [len(curve) for curve in correct] == [3, 3]  # before the first step, on the way, at the end
    (ptp, mtp), (first, *later) = (curve[-1] for curve in correct), zip(*given_prefix, strict=True)
    assert ptp > mtp + 0.2
    assert first == (1.0, 1.0) and all(of_ptp > of_mtp for of_ptp, of_mtp in later)


def test_where_decoding_time_goes(kernel: KernelManager) -> None:
    """No text changes, no time is lost between the phases, and more slots bring more tokens."""
    expressions = ["num_deviating", "unaccounted", "[measured[name].tokens_per_call for name in names]"]
    num_deviating, unaccounted, tokens_per_call = run(
        "4_where_decoding_time_goes",
        kernel,
        {"NUM_QUESTIONS": 2, "NUM_TOKENS": 12, "SLOT_BUDGETS": [2, 12]},
        expressions,
    )
    assert num_deviating == 0
    assert 0 <= unaccounted < 0.05
    autoregressive, _, few, many = tokens_per_call
    assert autoregressive == 1.0 < few <= many


@pytest.mark.slow  # tests/unit/sweeps tests studies and their reports
def test_reading_a_study(kernel: KernelManager, tmp_path: Path) -> None:
    """Means and intervals of two seeds each, by hand; shares that add up to 1."""
    expressions = ["[(row.parameters, row.mean, row.half_width) for row in rows]", "list(importances.values())"]
    expressions += ["[(trial.params, trial.value) for trial in trials]"]
    rows, importances, trials = run("3_reading_a_study", kernel, {"FULL": False, "RUNS": str(tmp_path)}, expressions)
    assert len(rows) == 4 and len(trials) == 8
    for parameters, mean, half_width in rows:
        first, second = (value for of_trial, value in trials if of_trial == parameters)
        assert mean == pytest.approx((first + second) / 2)
        assert half_width == pytest.approx(12.706 * abs(first - second) / 2, rel=1e-4)  # Student's t, one degree
    assert len(importances) == 2 and sum(importances) == pytest.approx(1)
