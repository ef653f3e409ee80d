"""Names of version 0.1 are refused with the names of today."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptp_lightning.cli import main
from ptp_lightning.utils.renamed_keys import (
    RENAMED_KEYS,
    RENAMED_MODULES,
    current_class_path,
    current_key,
    deleted_settings,
    with_current_names,
)

CLASSES = [
    "data.completions_datamodule.CompletionsDataModule",
    "data.file_rows.JsonLines",
    "data.hub_rows.HubRows",
    "data.markov.MarkovSeries",
    "data.mixture.StreamPart",
    "data.pickups.PickUps",
    "data.series.Series",
    "data.series_datamodule.SeriesDataModule",
    "data.streaming.StreamingCorpus",
    "models.continuous_features.CosineFeatures",
    "models.predictor_config.PredictorConfig",
    "models.slots.OneHotObjective",
    "models.stepped_features.BinaryFeatures",
    "training.analytic_windows.AnalyticWindows",
    "training.checkpoint_io.AtomicCheckpointIO",
    "training.distillation.DistillationModule",
    "training.mixture_windows.MixtureWindows",
    "training.pretraining.AutoregressiveModule",
    "training.self_training.InverseAutoregressiveModule",
    "training.strategies.FullyShardedStrategy",
    "training.student_windows.StudentWindows",
    "training.termination.TerminateTogether",
    "training.windows.TeacherWindows",
]


@pytest.mark.parametrize("old", CLASSES)
def test_classes_are_where_the_table_says(old: str) -> None:
    module, _, name = current_class_path(f"ptp_lightning.{old}").rpartition(".")
    assert getattr(import_module(module), name).__name__ == name


def test_the_table_of_modules_is_tested_and_has_no_module_of_today() -> None:
    assert {name.rpartition(".")[0] for name in CLASSES} == set(RENAMED_MODULES)
    for old in RENAMED_MODULES:
        spec = find_spec(f"ptp_lightning.{old}")
        assert spec is None or spec.submodule_search_locations  # a package of the same name has no such classes


@pytest.mark.parametrize("key", RENAMED_KEYS.values())
def test_names_of_today_stay(key: str) -> None:
    assert current_key(key) == key
    assert current_key(f"model.init_args.predictor.{key}.init_args") == f"model.init_args.predictor.{key}.init_args"


def test_keys_are_renamed_around_init_args() -> None:
    assert current_key("a.refiner.init_args.rounds.b") == "a.correction.init_args.num_refinement_steps.b"
    assert current_key("a.predictor.refiner") == "a.predictor.correction"
    assert current_key("a.predictor.refiner.num_layers") == "a.predictor.correction.init_args.num_layers"
    assert current_key("a.rounds") == "a.rounds"


@pytest.mark.parametrize(
    "content",
    [
        "model: {init_args: {predictor: {refiner: {rounds: 3}}}}",
        "model: {init_args: {predictor: {correction: {init_args: {base_layers: 0, start: random}}}}}",
        "model: {class_path: ptp_lightning.training.pretraining.AutoregressiveModule}",
        "trainer: {callbacks: [{class_path: ptp_lightning.training.termination.TerminateTogether}]}",
    ],
)
def test_configurations_of_version_0_1_are_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.yaml").write_text(content)
    message = refusal(monkeypatch, capsys, "fit", "--config", str(tmp_path / "old.yaml"))
    assert "old.yaml: names of version 0.1, rename them" in message
    assert " -> " in message


def test_options_and_studies_of_version_0_1_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--model.init_args.predictor.refiner.rounds=3"
    message = refusal(monkeypatch, capsys, "fit", "--config", "gated_lora", option)
    assert "refiner.rounds -> model.init_args.predictor.correction.init_args.num_refinement_steps" in message
    (tmp_path / "study.yaml").write_text("also: [a]\nprepare: [{makes: b}]\noverrides: {x.refiner.rounds: 1}")
    message = refusal(monkeypatch, capsys, "sweep", "run", str(tmp_path / "study.yaml"))
    for line in (
        "also -> extra_metrics",
        "prepare.makes -> prepare.output",
        "rounds -> overrides.x.correction.init_args.num_refi",
    ):
        assert line in message


@pytest.mark.parametrize("setting", ["base_layers=4", "start=last_layers"])
@pytest.mark.parametrize("parent", ["refiner", "correction", "correction.init_args"])
def test_deleted_layers_are_refused(
    parent: str, setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = f"model.init_args.predictor.{parent}.{setting}"
    (message,) = refusal(monkeypatch, capsys, "fit", "--config", "gated_lora", f"--{key}").splitlines()
    assert f"expected no {key.replace('=', ', found ')}: version 0.2 has no such layers any more; set" in message
    assert "set predictor.correction to ptp_lightning.models.TokenConditionedHead and train again" in message


def test_settings_of_those_names_elsewhere_stay() -> None:
    """Of another class, and of other components."""
    own = {"correction": {"class_path": "mine.Head", "init_args": {"start": "last_layers"}}, "loss": {"base_layers": 4}}
    assert not deleted_settings(own) and with_current_names(own) == own


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that ends with status 2 prints."""
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err
