"""Defaults of the command line: what a configuration need not say, and how it replaces or extends them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar

from ptp_lightning.models import DecoderRefiner, MarkovHead, PredictorConfig
from ptp_lightning.models.correction.correction import Correction
from ptp_lightning.sweeps.training_run import ParsingCLI
from ptp_lightning.training.callbacks import LogProgress, RunSummary
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed

BORING = {
    "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
    "data": {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"},
}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line for a boring model with these settings."""
    monkeypatch.chdir(tmp_path)

    def run(config: dict[str, Any], *options: str) -> TrainingCLI:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(BORING | config))
        return parsed(TrainingCLI, PlainErrorParser, ["--config", "run.yaml", *options], run=False)

    return run


def callbacks_of(cli: TrainingCLI, kind: type[Callback]) -> list[Any]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def test_a_checkpoint_is_written_at_every_validation(build: Any) -> None:
    (checkpoint,) = callbacks_of(build({"trainer": {"val_check_interval": 7}}), Checkpoint)
    assert checkpoint._every_n_train_steps == 7
    assert (checkpoint.save_last, checkpoint.save_top_k) == (True, 0)


def test_the_period_of_checkpoints_can_be_set(build: Any) -> None:
    (checkpoint,) = callbacks_of(build({"checkpoint": {"every_n_train_steps": 3}}), Checkpoint)
    assert checkpoint._every_n_train_steps == 3
    (checkpoint,) = callbacks_of(build({}, "--checkpoint.every_n_train_steps", "5"), Checkpoint)
    assert checkpoint._every_n_train_steps == 5


def test_a_checkpoint_among_the_callbacks_replaces_the_default(build: Any) -> None:
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 9}}
    (checkpoint,) = callbacks_of(build({"trainer": {"callbacks": [own]}}), ModelCheckpoint)
    assert checkpoint._every_n_train_steps == 9


def test_checkpoints_and_the_progress_bar_can_be_switched_off(build: Any) -> None:
    cli = build({"trainer": {"enable_checkpointing": False, "enable_progress_bar": False}})
    assert not callbacks_of(cli, Checkpoint)
    assert not callbacks_of(cli, ProgressBar)
    assert callbacks_of(cli, LogProgress)  # where there is no terminal, no bar would be shown anyway


@pytest.mark.parametrize(("key", "has_defaults"), [("callbacks", False), ("callbacks+", True)])
def test_callbacks_replace_or_extend_the_defaults(key: str, has_defaults: bool, build: Any) -> None:
    cli = build({"trainer": {key: [{"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}]}})
    assert any(type(callback).__name__ == "DeviceStatsMonitor" for callback in cli.trainer.callbacks)
    assert bool(callbacks_of(cli, RunSummary)) == has_defaults


def test_a_logger_keeps_its_other_defaults_when_it_is_named(build: Any) -> None:
    logger = build({"trainer": {"logger": {"init_args": {"name": "here"}}}}).trainer.logger
    assert (logger.name, logger.save_dir) == ("here", "runs")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["=null"], None),
        (["=ptp_lightning.models.MarkovHead", ".init_args.rank=3"], MarkovHead(rank=3)),
        ([".init_args.num_refinement_steps=2"], DecoderRefiner(num_refinement_steps=2)),
    ],
    ids=["none", "another", "its settings"],
)
def test_a_correction_is_replaced_or_removed_on_the_command_line(
    options: list[str], expected: Correction | None
) -> None:
    arguments = [f"--model.init_args.predictor.correction{option}" for option in options]
    cli = parsed(ParsingCLI, PlainErrorParser, ["--config", "gated_lora", *arguments], run=False)
    plain = cli.config.as_dict()["model"]["init_args"]["predictor"]["correction"]
    found = None if plain is None else PredictorConfig.from_dict({"correction": plain}).correction
    assert found == expected
