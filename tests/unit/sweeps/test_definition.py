"""A continued study is the one that was started."""

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution

from ptp_lightning.sweeps.attributes import DEFINITION
from ptp_lightning.sweeps.definition import MAX_SHOWN, definition_of, differences, flattened, require_same
from ptp_lightning.sweeps.run import open_study
from ptp_lightning.sweeps.storage import open_storage
from ptp_lightning.sweeps.study import Study
from ptp_lightning.utils.renamed_keys import REFINER_CLASS
from tests.helpers.tiny_study import letters

RANDOM = {"base_layers": 0, "start": "random"}
"""Settings of a refiner without the layers that it could have in version 0.1."""

BASE = {
    "model": {"rank": 4, "betas": (0.9, 0.99)},
    "trainer": {"max_steps": 9, "logger": {"a": 1}},
    "seed_everything": 0,
}


def start(tmp_path: Path, study: Study, base: dict[str, Any]) -> None:
    stored = open_study(study, "letters", open_storage(str(tmp_path / "study.journal"), create=True))
    require_same(stored, definition_of(study, base))


def test_the_same_study_continues_with_more_seeds_and_other_logs(tmp_path: Path) -> None:
    start(tmp_path, letters(), BASE)
    start(tmp_path, letters(seeds=(0, 1)), BASE)
    start(tmp_path, letters(), BASE | {"trainer": {"max_steps": 9, "logger": None}, "seed_everything": 3})
    start(tmp_path, letters(), BASE | {"config": ["seen/from/elsewhere.yaml"]})


@pytest.mark.parametrize(
    ("study", "base", "difference"),
    [
        (letters(), BASE | {"model": {"rank": 8, "betas": (0.9, 0.99)}}, "base.model.rank: was 4, is 8"),
        (letters(), BASE | {"model": {"rank": 4}}, "base.model.betas: was [0.9, 0.99], is nothing"),
        (
            letters(settings={"x": CategoricalDistribution(["a", "c"])}),
            BASE,
            'space.x.attributes.choices: was ["a", "b"], is ["a", "c"]',
        ),
        (letters(variants={"v": {"p": {"a": 1}}}), BASE, "space.v.p.a: was nothing, is 1"),
    ],
    ids=["base", "base without a key", "space", "variants"],
)
def test_another_one_is_refused_with_the_difference(
    study: Study, base: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    start(tmp_path, letters(), BASE)
    with pytest.raises(ValueError, match="set another --output or --storage") as refused:
        start(tmp_path, study, base)
    assert difference in str(refused.value)


def test_a_study_of_version_0_1_continues(tmp_path: Path) -> None:
    """Its storage has the old names, and keys that are not compared any more."""
    stored = open_study(letters(), "letters", open_storage(str(tmp_path / "study.journal"), create=True))
    settings = {"num_layers": 1, "num_refinement_steps": 3}
    now = {
        "predictor": {"correction": {"class_path": REFINER_CLASS, "init_args": settings}},
        "loss": {"class_path": "ptp_lightning.losses.KL"},
    }
    before = {
        "predictor": {"refiner": {"num_layers": 1, "rounds": 3, **RANDOM}, "student": {"init_args": {}}},
        "loss": {"class_path": "ptp_lightning.losses.KL"},
    }
    definition = definition_of(letters(), {"model": now, "source": "ptp_lightning.training.TeacherWindows"})
    old_base = flattened({"model": before}) | {
        "trainer.num_sanity_val_steps": 2,
        "source": "ptp_lightning.training.windows.TeacherWindows",
    }
    stored.set_user_attr(DEFINITION, definition | {"base": old_base})
    require_same(stored, definition)
    stored.set_user_attr(DEFINITION, definition | {"base": old_base | {"model.predictor.refiner.rounds": 4}})
    with pytest.raises(ValueError, match="base.model.predictor.correction.init_args.num_refinement_steps: was 4, is 3"):
        require_same(stored, definition)


def test_a_study_that_stored_the_settings_of_deleted_layers(tmp_path: Path) -> None:
    """It continues where it had none, and is refused where it had some."""
    stored = open_study(letters(), "letters", open_storage(str(tmp_path / "study.journal"), create=True))
    now, before = (
        {"correction": {"class_path": REFINER_CLASS, "init_args": {"num_layers": 1, **deleted}}}
        for deleted in ({}, RANDOM)
    )
    definition = definition_of(letters(), now)
    stored.set_user_attr(DEFINITION, definition | {"base": before})
    require_same(stored, definition)
    before["correction"]["init_args"] |= {"base_layers": 4}
    stored.set_user_attr(DEFINITION, definition | {"base": before})
    with pytest.raises(ValueError, match=r"^the study 'letters': .*base_layers, found 4: version 0.2 has no such"):
        require_same(stored, definition)


def test_a_long_difference_is_cut(tmp_path: Path) -> None:
    start(tmp_path, letters(), BASE)
    with pytest.raises(ValueError, match=f"and {30 - MAX_SHOWN} more"):
        start(tmp_path, letters(), BASE | {f"k{n}": n for n in range(30)})


def test_differences_name_paths() -> None:
    assert differences({"a": {"b": 1, "c": {}}}, {"a": {"b": 2}, "d": "x"}) == [
        "a.b: was 1, is 2",
        "a.c: was {}, is nothing",
        "d: was nothing, is x",
    ]
