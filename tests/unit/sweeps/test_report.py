"""The report of a study whose trials are made by hand: means, intervals, budgets, order."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial

from ptp_lightning.sweeps.attributes import (
    ACCURACY,
    COMMAND,
    CPU_SECONDS,
    GIVEN_UP,
    METRICS,
    PREFIX_COUNTS,
    SECONDS,
    SEED,
    STEPS,
    TOKENS,
    TRACEBACK,
    TRAINING_SECONDS,
)
from ptp_lightning.sweeps.figures import HISTORY, POSITIONS, SLICES
from ptp_lightning.sweeps.report import write_report
from ptp_lightning.sweeps.study import Published, PublishedValue, Study, StudyObjective
from ptp_lightning.sweeps.summary import baseline_row, best_row, half_width, rows_of
from tests.helpers.tiny_study import letters

BOTH = {"a": [1.0, 2.0, 3.0], "b": [4.0, 4.0, 7.0]}


def add(
    stored: optuna.Study,
    study: Study,
    parameters: dict[str, Any],
    value: float | None,
    seed: int = 0,
    **attributes: Any,
) -> None:
    """A trial as a worker writes it."""
    state = attributes.pop("state", TrialState.COMPLETE)
    result = {
        STEPS: study.steps_of(parameters),
        TOKENS: study.budget.tokens_of(study.steps_of(parameters)),
        SECONDS: 10.0 * (seed + 1),
        TRAINING_SECONDS: 10.0 * (seed + 1) - (seed + 1) / 2,
        CPU_SECONDS: 9.0 * (seed + 1),
        METRICS: {"val/other": 2.0 * (value or 0)},
        ACCURACY: [1.0, (value or 0) / 10],
        PREFIX_COUNTS: [0, 1, 2, 1],
        COMMAND: f"fit --seed {seed}",
        SEED: seed,
    }
    stored.add_trial(
        create_trial(
            state=state,
            value=value,
            params=parameters,
            distributions={name: study.distributions[name] for name in parameters},
            user_attrs=result | attributes,
        )
    )


def trained(study: Study, values: dict[str, list[float]] = BOTH) -> optuna.Study:
    stored = optuna.create_study(study_name="letters", direction=study.objective.direction)
    for seed in range(3):
        for letter, of_letter in values.items():
            add(stored, study, {"x": letter}, of_letter[seed], seed)
    return stored


def test_the_interval_is_students_t_over_seeds() -> None:
    # t with 2 and with 1 degrees of freedom at 0.975, from tables
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-6)
    assert half_width([1.0, 3.0]) == pytest.approx(12.706205 * math.sqrt(2) / math.sqrt(2), rel=1e-6)
    assert math.isnan(half_width([1.0]))


def test_the_table_with_published_values(tmp_path: Path) -> None:
    study = letters(
        seeds=(0, 1, 2),
        extra_metrics=["val/other", "val/none"],
        draft_lengths=[2, 4],
        published=Published("a paper, its table", [PublishedValue({"x": "b"}, 45.4)]),
    )
    stored = trained(study)
    add(stored, study, {"x": "a"}, None, state=TrialState.FAIL, **{TRACEBACK: "Traceback\nValueError: no"})
    add(stored, study, {"x": "a"}, None, state=TrialState.FAIL, **{GIVEN_UP: "stopped"})
    add(stored, study, {"x": "b"}, 9.0, state=TrialState.PRUNED)
    write_report(study, stored, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "| x | mean | ± | trials | pruned | failed | seconds per trial | val/other | val/none | published |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| a | 2.000 | 2.484 | 3 | 0 | 1 | 20.0 | 4.000 | - | - |\n"
        "| b | 5.000 | 4.303 | 3 | 1 | 0 | 20.0 | 10.000 | - | 45.4 |\n"
    ) in text
    assert "| a | 1.750 | - |\n" in text  # of 4 windows 1 has one correct token, 3 two or more; none has four positions
    assert "Overhead per trial outside training: median 1.0 s, at most 1.5 s." in text
    assert "Published: a paper, its table." in text
    assert "Best: x=b." in text
    assert "fit --seed 0" in text
    assert "* 6: ValueError: no" in text
    assert "after 4 steps and 8 tokens; seeds 0, 1, 2." in text
    assert "Importance" not in text  # of a single parameter
    for name in (HISTORY, SLICES, POSITIONS):
        assert (tmp_path / name).stat().st_size > 0
        assert f"]({name})" in text


@pytest.mark.parametrize("spent", [{STEPS: 2}, {TOKENS: 16}, {STEPS: None}])
def test_other_budgets_are_refused(spent: dict[str, Any], tmp_path: Path) -> None:
    study = letters()
    stored = trained(study)
    add(stored, study, {"x": "a"}, 9.0, **spent)
    with pytest.raises(ValueError, match="expected 4 steps and 8 tokens of every trial .* of trial 6"):
        write_report(study, stored, tmp_path)


def test_smaller_may_be_better() -> None:
    study = letters(objective=StudyObjective("val/loss", "minimize"))
    rows = rows_of(study, trained(study))
    best, worst = best_row(study, rows), baseline_row(study, rows)
    assert best is not None
    assert worst is not None
    assert (best.parameters, worst.parameters) == ({"x": "a"}, {"x": "b"})


def test_a_study_may_name_its_baseline() -> None:
    study = letters(baseline={"x": "b"})
    row = baseline_row(study, rows_of(study, trained(study)))
    assert row is not None
    assert row.parameters == {"x": "b"}


def test_importance_of_two_parameters(tmp_path: Path) -> None:
    """Of a grid, whose best trials alone would make a difference of 0.01 look as important as one of 10."""
    noises = [0, 1, 2]
    study = letters(
        settings={"x": CategoricalDistribution(["a", "b"]), "m.noise": CategoricalDistribution(noises)}, seeds=(0, 1)
    )
    stored = optuna.create_study(direction="maximize")
    for seed in (0, 1):
        for letter in ("a", "b"):
            for noise in noises:
                add(stored, study, {"x": letter, "m.noise": noise}, 10.0 * (letter == "b") + 0.01 * noise, seed)
    write_report(study, stored, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Importance of the parameters (fANOVA, shares of 1): x 1.00, noise 0.00." in text


def test_what_a_sampler_tried_comes_from_the_best_on(tmp_path: Path) -> None:
    study = letters(settings={"m.lr": FloatDistribution(0.0, 1.0)}, sampler=RandomSampler(), trials=3)
    stored = optuna.create_study(direction="maximize")
    for rate, value in ((0.125, 1.0), (0.25, 3.0), (0.5, 2.0)):
        add(stored, study, {"m.lr": rate}, value)
    assert [row.parameters["m.lr"] for row in rows_of(study, stored)] == [0.25, 0.5, 0.125]
    write_report(study, stored, tmp_path)
    assert "| 0.25 | 3.000 | - | 1 |" in (tmp_path / "report.md").read_text()


def test_nothing_trained_yet(tmp_path: Path) -> None:
    write_report(letters(), optuna.create_study(study_name="letters", direction="maximize"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
