"""Commands of the documentation that the tests of its pages need not run, because something else does."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A file of the repository, and words in it that show that a command runs there."""

    file: str
    words: str


PICTURES = "tests/integration/test_documentation_runs.py"
RUN_ELSEWHERE = {
    "pytest": Place(".ci/run", "\npytest --durations=25\n"),
    "pytest -m slow": Place(PICTURES, "pytestmark = pytest.mark.slow"),
    "pytest -n 0 --doctest-modules ptp_lightning": Place(".ci/run", "\npytest -n 0 --doctest-modules ptp_lightning\n"),
    "ruff check": Place(".ci/run", "\nruff check\n"),
    "ruff format --check": Place(".ci/run", "\nruff format --check\n"),
    "lint-imports": Place(".ci/run", "\nlint-imports\n"),
    "pyright": Place(".ci/run", "\npyright >"),
    "sphinx-build -W -b html docs docs/_build/html": Place(
        ".ci/run", "\nsphinx-build -q -W --keep-going -b html docs "
    ),
    ".ci/run": Place(".github/workflows/ci.yml", "- run: .ci/run\n"),
    "python -m tests.supported_models": Place("tests/integration/test_families.py", "def test_every_family("),
    "python docs/ar_vs_ptp.py": Place(PICTURES, '"ar_vs_ptp",'),
    "python docs/show_calls.py": Place(PICTURES, '"show_calls",'),
    "python docs/results/crossing_losses.py": Place(PICTURES, '"results/crossing_losses",'),
    "python docs/results/smollm2_training.py": Place(PICTURES, '"results/smollm2_training",'),
    "python docs/results/what_u_is_worth.py": Place(PICTURES, '"results/what_u_is_worth",'),
    "transformers serve": Place("tests/integration/test_serving.py", '[TRANSFORMERS, "serve",'),
    "transformers chat my_model": Place("tests/integration/test_serving.py", '[TRANSFORMERS, "chat",'),
}
"""By all words of a command, without quotes."""
