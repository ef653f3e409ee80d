"""A study's file: its points, its two versions, and what is refused before any work."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler

from ptp_lightning.sweeps.budget import Budget
from ptp_lightning.sweeps.study import (
    Point,
    Published,
    PublishedValue,
    Study,
    StudyObjective,
    load_study,
    path_from_study,
    study_name,
)
from tests.helpers.tiny_study import INDEPENDENT, letters, plain_study, write_study


def test_a_grid_has_all_points_of_the_first_seed_first() -> None:
    study = letters(seeds=(3, 4), variants={"v": {"p": {}, "q": {}}}, settings={"m.n": IntDistribution(1, 3, step=2)})
    assert study.points() == [
        Point({"v": v, "m.n": n}, seed) for seed in (3, 4) for v, n in (("p", 1), ("p", 3), ("q", 1), ("q", 3))
    ]
    assert len({point.key for point in study.points()}) == 8


def test_a_sampler_has_tickets() -> None:
    study = letters(sampler=RandomSampler(), trials=2, settings={"lr": FloatDistribution(0.1, 1.0)})
    assert study.points() == [Point({}, 0, 0), Point({}, 0, 1)]
    assert study.covering_points() == [{"lr": 0.1}, {"lr": 1.0}]


def test_covering_points_have_every_choice() -> None:
    study = letters(variants={"v": {"p": {}, "q": {}}}, settings={"n": CategoricalDistribution([1, 2, 3])})
    assert study.covering_points() == [{"v": "p", "n": 1}, {"v": "q", "n": 2}, {"v": "p", "n": 3}]


def test_parameters_as_overrides() -> None:
    study = letters(variants={"v": {"p": {"a.b": 1, "c": None}, "q": {}}}, settings={"m.n": IntDistribution(1, 2)})
    assert study.overrides_of({"v": "p", "m.n": 2}) == {"a.b": 1, "c": None, "m.n": 2}
    assert study.overrides_of({"v": "q", "m.n": 1}) == {"m.n": 1}


def test_a_metric_may_name_a_parameter() -> None:
    study = letters(settings={"m.n": IntDistribution(4, 5)}, objective=StudyObjective("val/best_of_{n}"))
    assert study.metric_of({"m.n": 4}) == "val/best_of_4"


def test_quick_entries_stand_in_for_those_of_the_full_version(tmp_path: Path) -> None:
    quick = {
        "seeds": [7],
        "overrides": {"data.init_args.seed": 1, "trainer.num_sanity_val_steps": None},
        "variants": {"objective": None, "size": {"small": {}}},
    }
    path = write_study(tmp_path, quick=quick, overrides={"a": 1, "trainer.num_sanity_val_steps": 0})
    full, small = load_study(path, full=True), load_study(path, full=False)
    assert (full.seeds, small.seeds) == ([0], [7])
    assert small.overrides == {"a": 1, "data.init_args.seed": 1}
    assert full.overrides == {"a": 1, "trainer.num_sanity_val_steps": 0}
    assert full.variants == {"objective": {"categorical": {}, "independent": INDEPENDENT}}
    assert small.variants == {"size": {"small": {}}}
    assert (study_name(path, full=True), study_name(path, full=False)) == ("tiny", "tiny_quick")


@pytest.mark.parametrize("quick", [None, {}, {"overrides": None}])
def test_a_quick_version_that_changes_nothing(quick: Any, tmp_path: Path) -> None:
    path = write_study(tmp_path, quick=quick)
    quick_version, full_version = (load_study(path, full=full) for full in (False, True))
    assert quick_version.points() == full_version.points()
    assert quick_version.overrides == full_version.overrides


def test_a_quick_version_is_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny\.yaml: expected keys of a study below quick, found list"):
        load_study(write_study(tmp_path, quick=[1]), full=False)


def test_classes_in_overrides_stay_names(tmp_path: Path) -> None:
    beta = {"class_path": "p.Beta", "init_args": {"b": 2, "inner": {"class_path": "p.C"}}}
    study = load_study(write_study(tmp_path, variants={"v": {"x": {"s.t": beta}}}), full=True)
    assert study.variants == {"v": {"x": {"s.t": "p.Beta", "s.t.init_args.b": 2, "s.t.init_args.inner": "p.C"}}}
    terms = [{"loss": {"class_path": "ptp_lightning.losses.CrossEntropy"}, "weight": 0.1}]
    study = load_study(write_study(tmp_path, overrides={"terms": terms}), full=True)
    assert study.overrides == {"terms": terms}


def test_files_are_named_as_seen_from_the_study() -> None:
    assert path_from_study(Path("sweeps/losses.yaml"), "../configs/x.yaml") == "configs/x.yaml"


CATEGORIES = {"class_path": "optuna.distributions.CategoricalDistribution", "init_args": {"choices": [1, 2]}}
ENDLESS = {"class_path": "optuna.distributions.FloatDistribution", "init_args": {"low": 0.0, "high": 1.0}}
AXIS = {"steps": [2, 4], "tokens": 8, "validations": 1}
SAMPLER = {"class_path": "optuna.samplers.RandomSampler"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "expected parameters to compare, found none: set variants or settings"),
        ({"variants": {"v": {}}}, "choices of variants.v, found none"),
        ({"variants": {"v": None}}, "choices of variants.v, found none"),
        ({"variants": {"n": {"a": {}}}, "settings": {"n": CATEGORIES}}, "each parameter once"),
        ({"settings": {"a.n": CATEGORIES, "b.n": CATEGORIES}}, "paths end differently"),
        ({"settings": {"a.n": ENDLESS}}, "finitely many values of settings.a.n"),
        ({"settings": {"a.n": {"class_path": "optuna.distributions.Beta"}}}, "Beta"),
        ({"seeds": []}, "different seeds, at least one"),
        ({"seeds": [1, 1]}, "different seeds, at least one"),
        ({"sampler": SAMPLER}, "sampler and trials together"),
        ({"trials": 3}, "sampler and trials together"),
        ({"sampler": SAMPLER, "trials": 0}, "trials >= 1, found 0"),
        ({"sampler": SAMPLER, "trials": 3, "seeds": [0, 1]}, "expected a single seed with a sampler"),
        ({"budget": {"steps": 5, "tokens": 1, "validations": 2}}, "a multiple of budget.validations"),
        ({"budget": {"steps": 4}}, "tokens"),
        ({"budget": {"steps": [], "tokens": 1}}, "different numbers in budget.steps, at least one"),
        ({"budget": {"steps": [2, 2], "tokens": 4}}, "different numbers in budget.steps, at least one"),
        (
            {"budget": {"steps": [2, 4], "tokens": 8}},
            "expected budget.validations 1 with several budget.steps, found 4",
        ),
        ({"budget": {"steps": [2, 4], "tokens": 6, "validations": 1}}, "a multiple of the largest of budget.steps"),
        ({"budget": AXIS, "sampler": SAMPLER, "trials": 3}, "one number of budget.steps with a sampler"),
        ({"budget": AXIS, "settings": {"trainer.max_steps": CATEGORIES}}, "paths end differently"),
        ({"baseline": {"objectiv": "independent"}}, "one of the parameters ['objective'], found 'objectiv'"),
        ({"baseline": {"objective": "mtp"}}, "one of the choices ['categorical', 'independent'] of objective"),
        ({"objective": {"metric": "val/best_of_{num}"}}, "objective.metric to name parameters"),
        ({"sedes": [1]}, "sedes"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s)tiny.yaml: .*{re.escape(message)}"):
        load_study(write_study(tmp_path, **changes), full=True)


def test_published_points_are_points_of_the_study() -> None:
    with pytest.raises(ValueError, match="one of the choices \\['a', 'b'\\] of x, found 'c'"):
        letters(published=Published("a paper", [PublishedValue({"x": "c"}, 1.0)]))


def test_files_that_are_no_studies(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a study"):
        load_study(tmp_path / "none.yaml", full=True)
    path = tmp_path / "x.yaml"
    for text, message in (("- 1", "found list"), ("a: [", "expected YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_study(path, full=True)


def test_a_studys_file_is_what_the_classes_say(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), full=True)
    plain: Any = plain_study()
    assert study == Study(**(plain | {"budget": Budget(**plain["budget"]), "pruner": study.pruner}))
    assert yaml.safe_load((tmp_path / "tiny.yaml").read_text()) == plain
