"""Callbacks: what a small run leaves in TensorBoard's files and on the terminal."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.utils.data import DataLoader

from ptp_lightning.data import MarkovSeries, SeriesDataModule
from ptp_lightning.metrics import WindowMetrics, WindowSummary, as_tags
from ptp_lightning.training.callbacks import FinalMetrics, PositionCharts, RunSummary
from tests.helpers.tiny_data import tiny_data

# One validation batch a list of windows; the model gets better with every validation.
VALIDATIONS = [("100", "000"), ("110", "100"), ("111", "110")]


class TinyModule(LightningModule):
    """Trains one number and validates windows written out by hand."""

    val_summary: WindowSummary

    def __init__(self, rank: int = 4, summarise: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.summarise = summarise
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.val_metrics = WindowMetrics(3)
        self.validations = iter(VALIDATIONS)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * batch.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            windows = next(self.validations)
            correct = torch.tensor([[token == "1" for token in window] for window in windows])
            self.val_metrics.update(correct, torch.ones_like(correct), torch.ones(correct.shape))

    def on_validation_epoch_end(self) -> None:
        if self.summarise:
            self.val_summary = self.val_metrics.compute()
            self.log_dict(as_tags(self.val_summary))
            self.log("val/loss_nats", 0.5)
        self.val_metrics.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: LightningModule, directory: Path, **options: Any) -> Trainer:
    """Three validations: before the first step, after steps 2 and 4; two batches each."""
    options = {
        "logger": TensorBoardLogger(directory, name="tiny", default_hp_metric=False),
        "callbacks": [PositionCharts(), FinalMetrics(), RunSummary(), ModelCheckpoint(save_last=True)],
        "num_sanity_val_steps": -1,
        **options,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        max_epochs=2,
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = DataLoader([torch.ones(1), torch.ones(1)], batch_size=1)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, loader)
    return trainer


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.chdir(tmp_path)
    return fit(TinyModule(), tmp_path)


def read_events(trainer: Trainer) -> EventAccumulator:
    assert isinstance(trainer.logger, TensorBoardLogger)
    sizes = {"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}
    return EventAccumulator(trainer.logger.log_dir, size_guidance=sizes).Reload()


def test_scalars_begin_at_step_zero_and_are_not_written_over(run: Trainer) -> None:
    events = read_events(run)
    points = [(event.step, event.value) for event in events.Scalars("val/correct_tokens")]
    assert [value for step, value in points if step == 0] == [0.5]
    assert points[-1] == (4, 2.5)
    assert {value for step, value in points if step == 4} == {2.5}
    assert "val/accuracy_given_prefix/position_02" in events.Tags()["scalars"]


def test_charts_are_laid_out_by_position(run: Trainer) -> None:
    events = read_events(run)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()  # pyright: ignore[reportAttributeAccessIssue]
    layout.ParseFromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {
        "accuracy": [r"val/accuracy/position_\d+"],
        "accuracy given a correct prefix": [r"val/accuracy_given_prefix/position_\d+"],
        "perplexity": [r"val/perplexity/position_\d+"],
        "divergence from the teacher": [r"val/kl/position_\d+"],
    }


def test_a_figure_per_validation(run: Trainer) -> None:
    images = read_events(run).Images("val/correct_token_counts")
    assert [image.step for image in images] == [0, 2, 4]
    assert len({image.encoded_image_string for image in images}) == 3


def test_hyperparameters_stand_beside_the_final_metrics(run: Trainer) -> None:
    content = read_events(run).summary_metadata
    start, experiment = HParamsPluginData(), HParamsPluginData()
    start.ParseFromString(content["_hparams_/session_start_info"].plugin_data.content)
    experiment.ParseFromString(content["_hparams_/experiment"].plugin_data.content)
    assert start.session_start_info.hparams["rank"].number_value == 4
    assert {info.name.tag for info in experiment.experiment.metric_infos} == {
        "val/correct_tokens",
        "val/correct_tokens_standard_error",
        "val/loss_nats",
    }


def test_the_summary_says_what_came_out_and_what_comes_next(capsys: pytest.CaptureFixture[str], run: Trainer) -> None:
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "correct tokens per call 0.50 ± 0.50 2.50 ± 0.50" in lines  # before the first step, and at the end
    assert "gained by the slots -0.50 ± 0.50 1.50 ± 0.50" in lines
    assert "2 0.500 0.500" in lines  # windows "111" and "110"
    assert "Logs tiny/version_0" in lines
    assert "Watch tensorboard --logdir tiny" in lines
    checkpoint = "tiny/version_0/checkpoints/epoch=1-step=4.ckpt"
    assert f"Checkpoint {checkpoint}" in lines
    assert f'Next python -m ptp_lightning generate --ckpt_path {checkpoint} --prompt "def "' in lines
    assert Path(checkpoint).is_file()


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_only_text_is_continued_from_a_prompt(
    has_tokenizer: bool, run: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run.datamodule = tiny_data() if has_tokenizer else SeriesDataModule(MarkovSeries())  # pyright: ignore[reportAttributeAccessIssue]
    summary = next(callback for callback in run.callbacks if isinstance(callback, RunSummary))  # pyright: ignore[reportAttributeAccessIssue]
    capsys.readouterr()
    summary.complete = True
    summary.teardown(run, run.lightning_module, "fit")
    printed = capsys.readouterr().out
    assert "Checkpoint " in printed
    assert ("Next " in printed) == has_tokenizer


def test_long_paths_with_blanks_and_brackets_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / ("long" * 20) / "my [bold]runs"
    fit(TinyModule(), directory)
    path = directory / "tiny/version_0/checkpoints/epoch=1-step=4.ckpt"
    assert f"--ckpt_path '{path}' --prompt" in capsys.readouterr().out


def test_an_incomplete_sanity_check_is_not_a_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(TinyModule(), tmp_path, num_sanity_val_steps=1)
    assert [image.step for image in read_events(trainer).Images("val/correct_token_counts")] == [2, 4]
    assert "1.50 ± 0.50" in capsys.readouterr().out  # the first of the two complete ones


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": True}, {"logger": None}])
def test_other_loggers(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if options.get("logger", 0) is None:
        options = {"logger": CSVLogger(tmp_path)}
    trainer = fit(TinyModule(), tmp_path, **options)
    output = capsys.readouterr().out
    assert not list(tmp_path.rglob("events.out.tfevents*"))
    assert ("correct tokens per call" in output) == (not trainer.fast_dev_run)  # pyright: ignore


def test_modules_without_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(TinyModule(summarise=False), tmp_path)
    output = capsys.readouterr().out
    assert read_events(trainer).Tags()["images"] == []
    assert "Checkpoint" in output
    assert "generate" not in output


@pytest.mark.parametrize("is_global_zero", [True, False])
def test_only_rank_zero_writes(
    is_global_zero: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = TinyModule()
    trainer = fit(module, tmp_path, callbacks=[], enable_checkpointing=False)
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: is_global_zero))
    capsys.readouterr()
    for callback in (PositionCharts(), FinalMetrics(), RunSummary()):
        callback.on_fit_start(trainer, module)
        callback.on_validation_end(trainer, module)
        callback.on_fit_end(trainer, module)
        callback.teardown(trainer, module, "fit")
    assert isinstance(trainer.logger, TensorBoardLogger)
    trainer.logger.experiment.flush()
    written = read_events(trainer).Tags()
    assert bool(written["images"]) == is_global_zero
    assert ("custom_scalars__config__" in written["tensors"]) == is_global_zero
    assert ("_hparams_/experiment" in read_events(trainer).summary_metadata) == is_global_zero
    assert bool(capsys.readouterr().out) == is_global_zero
