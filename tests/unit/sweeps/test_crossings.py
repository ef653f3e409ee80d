"""Where curves cross, and what a report says about it."""

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution

from ptp_lightning.sweeps.budget import STEPS_KEY, Budget
from ptp_lightning.sweeps.crossings import crossings_of, curves_of, differences_of
from ptp_lightning.sweeps.figures import CURVES, HISTORY
from ptp_lightning.sweeps.report import write_report
from ptp_lightning.sweeps.study import Study, StudyObjective
from ptp_lightning.sweeps.summary import rows_of
from tests.helpers.tiny_study import letters
from tests.unit.sweeps.test_report import add

STEPS = [10, 1000, 100]
Results = dict[str, dict[int, list[float]]]

# a leads b at 10 steps and trails it at 1000 by more than noise; at 100 both are equal but for noise.
CROSSING: Results = {
    "a": {10: [3.0, 4.0, 3.5], 100: [5.0, 5.1, 5.0], 1000: [6.0, 6.1, 6.0]},
    "b": {10: [1.0, 2.1, 1.5], 100: [5.1, 4.8, 5.0], 1000: [8.0, 8.0, 8.2]},
}


def study_of(**changes: Any) -> Study:
    return letters(seeds=(0, 1, 2), budget=Budget(STEPS, 2000, validations=1), **changes)


def trained(study: Study, results: Results) -> optuna.Study:
    stored = optuna.create_study(study_name="letters", direction=study.objective.direction)
    for letter, by_steps in results.items():
        for steps, values in by_steps.items():
            for seed, value in enumerate(values):
                add(stored, study, {"x": letter, STEPS_KEY: steps}, value, seed)
    return stored


def crossings(study: Study, results: Results) -> list[Any]:
    curves = curves_of(rows_of(study, trained(study, results)))
    return crossings_of(curves, larger_is_better=study.objective.direction == "maximize")


def test_differences_are_paired_by_seed() -> None:
    study = study_of()
    first, second = curves_of(rows_of(study, trained(study, CROSSING)))
    short, _, _ = differences_of(first, second)
    assert (short.steps, short.mean) == (10, pytest.approx((2.0 + 1.9 + 2.0) / 3))
    # Student's t with 2 degrees of freedom; the spread over seeds, 0.5, is common to both curves and does not count
    assert short.half_width == pytest.approx(4.302653 * 0.0577350 / math.sqrt(3), rel=1e-4)


def test_a_crossing_between_clear_leads_is_beyond_noise() -> None:
    (crossing,) = crossings(study_of(), CROSSING)
    assert crossing.is_beyond_noise
    assert (crossing.leader.parameters, crossing.follower.parameters) == ({"x": "a"}, {"x": "b"})
    assert (crossing.before.steps, crossing.after.steps) == (10, 1000)  # 100 is within noise on its side
    assert 100 < crossing.steps < 1000


def test_where_smaller_is_better_the_other_curve_leads() -> None:
    (crossing,) = crossings(study_of(objective=StudyObjective(direction="minimize")), CROSSING)
    assert (crossing.leader.parameters, crossing.follower.parameters) == ({"x": "b"}, {"x": "a"})
    assert crossing.before.mean > 0 > crossing.after.mean


def test_the_crossing_lies_where_the_lead_is_zero_on_the_logarithmic_axis() -> None:
    results: Results = {"a": {10: [1.0], 1000: [1.0]}, "b": {10: [0.0], 1000: [2.0]}}
    (crossing,) = crossings(study_of(), results)
    assert crossing.steps == pytest.approx(100)
    assert not crossing.is_beyond_noise  # one seed says nothing about noise


def test_a_lead_that_is_within_noise_makes_no_clear_crossing() -> None:
    results = CROSSING | {"b": CROSSING["b"] | {1000: [5.0, 8.0, 9.0]}}
    (crossing,) = crossings(study_of(), results)
    assert not crossing.is_beyond_noise


def test_parallel_curves_do_not_cross() -> None:
    assert crossings(study_of(), {"a": CROSSING["a"], "b": {steps: [0.0] * 3 for steps in STEPS}}) == []


def test_the_best_is_one_of_the_largest_budget(tmp_path: Path) -> None:
    study = study_of(objective=StudyObjective(direction="minimize"))
    assert "Best: x=a max_steps=1000." in write_report(study, trained(study, CROSSING), tmp_path)


def test_steps_without_any_result_are_named_once(tmp_path: Path) -> None:
    study = study_of()
    text = write_report(study, trained(study, {"a": {10: [1.0, 2.0, 3.0]}, "b": {10: [1.0]}}), tmp_path)
    assert "missing. 10 steps: x=b (1 of 3); 100 steps: all; 1,000 steps: all.\n" in text


def test_the_report_of_several_budgets(tmp_path: Path) -> None:
    choices = CategoricalDistribution(["a", "b", "c"])
    study = study_of(settings={"x": choices})
    text = write_report(study, trained(study, CROSSING | {"c": {10: [0.5, 0.5]}}), tmp_path)
    assert "after 10, 100 or 1,000 steps of 2 tokens; seeds" in text
    assert "| x | 10 steps | 100 steps | 1,000 steps |\n" in text
    assert "| a | 3.50 ± 1.24 | 5.03 ± 0.14 | 6.03 ± 0.14 |\n" in text
    assert "| c | 0.50 ± 0.00 | - | - |\n" in text
    assert "Crossings: 1, of which 1 beyond noise" in text
    assert "* x=a leads x=b by 1.97 ± 0.14 at 10 and trails it by 2.03 ± 0.38 at 1,000 steps; they" in text
    assert "they cross near 110, beyond noise." in text
    missing = "10 steps: x=c (2 of 3); 100 steps: x=c (0 of 3); 1,000 steps: x=c (0 of 3)."
    assert f"Results of seeds are missing. {missing}\n" in text
    assert "Best: x=b max_steps=1000." in text
    assert (tmp_path / CURVES).stat().st_size > 0
    assert not (tmp_path / HISTORY).exists()
