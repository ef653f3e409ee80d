"""Callbacks: what a small run leaves in the files of loggers and on the terminal."""

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
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.utils.data import DataLoader

from ptp_lightning.data import MarkovSeries, SeriesDataModule
from ptp_lightning.metrics import WindowMetrics, WindowSummary, as_tags
from ptp_lightning.training.callbacks import (
    FinalMetrics,
    PositionCharts,
    RunSettings,
    RunSummary,
    RunText,
)
from ptp_lightning.training.callbacks.figures import ValidationCurves, draw_by_position, draw_correct_token_counts
from tests.helpers.chat_tokenizer import chat_tokenizer
from tests.helpers.tiny_data import tiny_data

# One validation batch a list of windows; the model gets better with every validation.
VALIDATIONS = [("100", "000"), ("110", "100"), ("111", "110")]


class TinyModule(LightningModule):
    """Trains one number and validates windows written out by hand."""

    val_summary: WindowSummary

    def __init__(self, summarise: bool = True) -> None:
        super().__init__()
        self.summarise = summarise
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.val_metrics = WindowMetrics(3)
        self.validations = iter(VALIDATIONS)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.weight * batch.sum()
        self.log("train/loss_nats", loss)
        return loss

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


def summary_of(*windows: str) -> WindowSummary:
    metrics = WindowMetrics(3)
    correct = torch.tensor([[token == "1" for token in window] for window in windows])
    metrics.update(correct, torch.ones_like(correct), torch.ones(correct.shape))
    return metrics.compute()


def fit(module: LightningModule, directory: Path, **options: Any) -> Trainer:
    """Three validations: before the first step, after steps 2 and 4; two batches each."""
    options = {
        "logger": TensorBoardLogger(directory, name="tiny", default_hp_metric=False),
        "callbacks": [
            RunSettings({"rank": 4, "objective": "OneHotObjective"}),
            PositionCharts(),
            RunText(),
            FinalMetrics(),
            RunSummary(),
            ModelCheckpoint(save_last=True),
        ],
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


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What a run has written."""
    return read_events(fit(TinyModule(), tmp_path_factory.mktemp("run")))


def read_events(trainer: Trainer) -> EventAccumulator:
    assert isinstance(trainer.logger, TensorBoardLogger)
    sizes = {"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}
    return EventAccumulator(trainer.logger.log_dir, size_guidance=sizes).Reload()


def test_scalars_begin_at_step_zero_and_are_not_written_over(events: EventAccumulator) -> None:
    points = [(event.step, event.value) for event in events.Scalars("val/correct_tokens")]
    assert [value for step, value in points if step == 0] == [0.5]
    assert points[-1] == (4, 2.5)
    assert {value for step, value in points if step == 4} == {2.5}
    assert "val/accuracy_given_prefix/position_02" in events.Tags()["scalars"]


def test_figures_of_each_validation(events: EventAccumulator) -> None:
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps == {
        "val/by_position": [0, 2, 4],
        "val/correct_token_counts": [0, 2, 4],
        "val/accuracy_by_step": [2, 4],  # of several validations
    }
    for tag in steps:
        images = events.Images(tag)
        assert len({image.encoded_image_string for image in images}) == len(images)


def test_a_line_for_each_validation_and_a_panel_for_each_metric_with_data() -> None:
    divergences = {1: 0.5, 2: 0.25}
    summaries = [summary_of(*windows) for windows in VALIDATIONS]
    history = [ValidationCurves.of(10 * step, summary, {}) for step, summary in enumerate(summaries)]
    figure = draw_by_position(history)
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy", "accuracy given a correct prefix", "perplexity"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["step 0", "step 10", "step 20"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [curves.accuracy for curves in history]
    brightness = [sum(line.get_color()[:3]) for line in figure.axes[0].lines]
    assert brightness == sorted(brightness, reverse=True)
    with_divergence = draw_by_position([ValidationCurves.of(0, summaries[0], divergences)])
    assert with_divergence.axes[-1].get_ylabel() == "divergence from the teacher [nats]"


def test_counts_have_whole_ticks() -> None:
    (axes,) = draw_correct_token_counts(summary_of("110", "100")).axes
    assert list(axes.get_xticks()) == [0, 1, 2, 3]
    assert [bar.get_height() for bar in axes.patches] == [0, 0.5, 0.5, 0]  # type: ignore[attr-defined]


def test_charts_of_a_resumed_run_begin_where_the_first_one_did() -> None:
    first, resumed = PositionCharts(), PositionCharts()
    first._history = [ValidationCurves.of(3, summary_of("110"), {})]
    resumed.load_state_dict(first.state_dict())
    assert resumed._history == first._history


def test_hyperparameters_stand_beside_the_final_metrics(events: EventAccumulator) -> None:
    content = events.summary_metadata
    start, experiment = HParamsPluginData(), HParamsPluginData()
    start.ParseFromString(content["_hparams_/session_start_info"].plugin_data.content)
    experiment.ParseFromString(content["_hparams_/experiment"].plugin_data.content)
    assert start.session_start_info.hparams["rank"].number_value == 4
    assert start.session_start_info.hparams["objective"].string_value == "OneHotObjective"
    assert {info.name.tag for info in experiment.experiment.metric_infos} == {
        "val/correct_tokens",
        "val/correct_tokens_standard_error",
        "val/loss_nats",
        "val/nll_nats",
        "train/loss_nats",
    }


def test_an_interrupted_run_has_hyperparameters_and_metrics_too(tmp_path: Path) -> None:
    class Stopped(TinyModule):
        def on_train_epoch_end(self) -> None:
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fit(Stopped(), tmp_path)
    (folder,) = (tmp_path / "tiny").iterdir()
    assert "_hparams_/session_start_info" in EventAccumulator(str(folder)).Reload().summary_metadata


def test_the_command_and_the_results_are_text(events: EventAccumulator) -> None:
    texts = {
        tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("run/command", "run/results")
    }
    assert texts["run/command"].startswith("```\npython ")
    assert "**2.500** correct tokens of a window in 2 windows" in texts["run/results"]
    assert "| 2 | 0.500 | 0.500 | 2.718 |" in texts["run/results"]


def test_settings_reach_files_without_tensorboard(tmp_path: Path) -> None:
    fit(TinyModule(), tmp_path, logger=CSVLogger(tmp_path, name="csv"))
    (file,) = (tmp_path / "csv").rglob("hparams.yaml")
    assert file.read_text() == "rank: 4\nobjective: OneHotObjective\n"


def test_the_summary_says_what_came_out_and_what_comes_next(capsys: pytest.CaptureFixture[str], run: Trainer) -> None:
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "correct tokens of a window 0.50 ± 0.50 2.50 ± 0.50" in lines  # before the first step, and at the end
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


def test_the_next_command_of_a_chat_model_is_a_chat(run: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    data = run.datamodule = tiny_data()  # pyright: ignore[reportAttributeAccessIssue]
    data.tokenizer = chat_tokenizer()
    summary = next(callback for callback in run.callbacks if isinstance(callback, RunSummary))  # pyright: ignore[reportAttributeAccessIssue]
    capsys.readouterr()
    summary.complete = True
    summary.teardown(run, run.lightning_module, "fit")
    assert '--chat --prompt "What is a prime number?"' in " ".join(capsys.readouterr().out.split())


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
    assert ("correct tokens of a window" in output) == (not trainer.fast_dev_run)  # pyright: ignore


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
    for callback in (PositionCharts(), RunText(), FinalMetrics(), RunSummary()):
        callback.on_fit_start(trainer, module)
        callback.on_validation_end(trainer, module)
        callback.on_fit_end(trainer, module)
        callback.teardown(trainer, module, "fit")
    assert isinstance(trainer.logger, TensorBoardLogger)
    trainer.logger.experiment.flush()
    written = read_events(trainer).Tags()
    assert bool(written["images"]) == is_global_zero
    assert ("run/results/text_summary" in written["tensors"]) == is_global_zero
    assert ("_hparams_/experiment" in read_events(trainer).summary_metadata) == is_global_zero
    assert bool(capsys.readouterr().out) == is_global_zero
