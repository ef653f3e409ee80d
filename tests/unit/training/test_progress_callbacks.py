"""Callbacks that log speed and learning rate, and print progress where there is no terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import rich
import torch

from ptp_lightning.batch import PackedBatch
from ptp_lightning.metrics import WindowMetrics, WindowSummary
from ptp_lightning.training.callbacks import LearningRate, LogProgress, StepProgressBar, TrainingSpeed, training_speed
from ptp_lightning.utils import progress_lines


class Recorder:
    """A logger, and a clock."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.seconds = 0.0

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def look(self) -> float:
        return self.seconds


ROWS = torch.zeros(2, 6, dtype=torch.int64)
BATCH = PackedBatch(ROWS, ROWS, ROWS, window_starts=torch.ones(2, 4, dtype=torch.int64), completion_mask=ROWS.bool())


def two_correct_tokens() -> WindowSummary:
    metrics = WindowMetrics(3)
    metrics.update(torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.bool))
    return metrics.compute()


MODULE: Any = SimpleNamespace(device=torch.device("cpu"), val_summary=two_correct_tokens())


def fake_trainer(recorder: Recorder, **options: Any) -> Any:
    defaults = {
        "global_step": 0,
        "world_size": 2,
        "log_every_n_steps": 2,
        "loggers": [recorder],
        "optimizers": [SimpleNamespace(param_groups=[{"lr": 0.25}, {"lr": 0.5}])],
        "is_global_zero": True,
        "fast_dev_run": False,
        "sanity_checking": False,
        "estimated_stepping_batches": 40,
        "callback_metrics": {"train/loss_nats": torch.tensor(1.25)},
        "num_val_batches": [100],
        "num_sanity_val_batches": [100],
        "num_test_batches": [float("inf")],
    }
    return SimpleNamespace(**(defaults | options))


def test_speed_is_logged_without_validations_and_by_optimiser_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, speed = Recorder(), TrainingSpeed()
    trainer = fake_trainer(recorder)
    monkeypatch.setattr(training_speed.time, "perf_counter", recorder.look)
    monkeypatch.setattr(training_speed, "memory_bytes", lambda device: 3 * 2**30)
    speed.on_train_start(trainer, MODULE)
    for step in (0, 1, 1, 2, 2, 3, 3, 4):  # two micro-batches of each step
        trainer.global_step = step
        recorder.seconds += 0.5
        speed.on_train_batch_end(trainer, MODULE, None, BATCH, 0)
        if step == 3:
            speed.on_validation_start(trainer, MODULE)
            recorder.seconds += 100
            speed.on_validation_end(trainer, MODULE)
    (first, of_first), (second, of_second) = recorder.logged
    assert (first, second) == (2, 4)
    # Half a second for each micro-batch; each of both processes has two rows of six tokens and eight windows.
    assert of_first == {
        "perf/seconds_per_step": 1.0,
        "perf/memory_gib": 3.0,
        "perf/tokens_per_second": 2 * 24 / 1.0,
        "perf/windows_per_second": 2 * 16 / 1.0,
    }
    assert of_second == of_first | {
        "perf/seconds_per_step": 1.0,
        "perf/tokens_per_second": 4 * 24 / 2.0,
        "perf/windows_per_second": 4 * 16 / 2.0,
    }


def test_the_learning_rate_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    trainer = fake_trainer(recorder)
    for step in range(4):
        trainer.global_step = step
        LearningRate().on_train_batch_start(trainer, MODULE, BATCH, 0)
    assert recorder.logged == [(0, {"train/learning_rate": 0.25}), (2, {"train/learning_rate": 0.25})]


def printed_lines(
    trainer: Any, num_steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **options: Any
) -> list[str]:
    recorder, progress = Recorder(), LogProgress(**options)
    monkeypatch.setattr(progress_lines.time, "monotonic", recorder.look)
    progress.setup(trainer, MODULE, "fit")
    progress.on_train_start(trainer, MODULE)
    for step in range(1, num_steps + 1):
        trainer.global_step = step
        recorder.seconds += 0.5
        progress.on_train_batch_end(trainer, MODULE, None, BATCH, 0)
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed_lines(fake_trainer(Recorder()), 40, monkeypatch, capsys, every_fraction=0.25)
    assert lines == [  # half a second for each step
        "step 10/40 (25%), loss 1.250 nats, validation 2.00 correct tokens, 48 tokens/s, 15 s left",
        "step 20/40 (50%), loss 1.250 nats, validation 2.00 correct tokens, 48 tokens/s, 10 s left",
        "step 30/40 (75%), loss 1.250 nats, validation 2.00 correct tokens, 48 tokens/s, 5 s left",
        "step 40/40 (100%), loss 1.250 nats, validation 2.00 correct tokens, 48 tokens/s, 0 s left",
    ]


def test_progress_of_a_stream_without_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fake_trainer(Recorder(), estimated_stepping_batches=float("inf"), callback_metrics={})
    lines = printed_lines(trainer, 130, monkeypatch, capsys)
    assert lines == [f"step {step}, validation 2.00 correct tokens, 48 tokens/s" for step in (60, 120)]  # 30 s apart


def test_speed_in_a_line_does_not_count_validations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder, progress, trainer = Recorder(), LogProgress(every_fraction=0.5), fake_trainer(Recorder())
    monkeypatch.setattr(progress_lines.time, "monotonic", recorder.look)
    progress.setup(trainer, MODULE, "fit")
    progress.on_train_start(trainer, MODULE)
    for step in range(1, 21):
        trainer.global_step = step
        recorder.seconds += 0.5
        progress.on_train_batch_end(trainer, MODULE, None, BATCH, 0)
        if step == 19:  # 9.5 s after the start
            progress.on_validation_start(trainer, MODULE)
            recorder.seconds += 29
            progress.on_validation_batch_end(trainer, MODULE, None, BATCH, 0)
            progress.on_validation_end(trainer, MODULE)
    validation, training = capsys.readouterr().err.splitlines()
    assert validation == "validation: batch 1/100, 29 s"
    assert "step 20/40 (50%)" in training and "48 tokens/s" in training


@pytest.mark.parametrize(
    ("hooks", "options", "expected"),
    [
        ("validation", {}, ["validation: batch 15/100, 30 s", "validation: batch 30/100, 1 min 00 s"]),
        (
            "validation",
            {"sanity_checking": True},
            ["validation: batch 15/70, 30 s", "validation: batch 30/70, 1 min 00 s"],
        ),
        ("test", {}, ["test: batch 15, 30 s", "test: batch 30, 1 min 00 s"]),
        ("test", {"is_global_zero": False}, []),
    ],
    ids=["validation", "before training", "test of unknown length", "another rank"],
)
def test_progress_of_measurements(
    hooks: str,
    options: dict[str, Any],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder, progress = Recorder(), LogProgress()
    trainer = fake_trainer(Recorder(), num_sanity_val_batches=[30, 40], **options)
    monkeypatch.setattr(progress_lines.time, "monotonic", recorder.look)
    progress.setup(trainer, MODULE, "validate")
    getattr(progress, f"on_{hooks}_start")(trainer, MODULE)
    for k in range(40):
        recorder.seconds += 2
        getattr(progress, f"on_{hooks}_batch_end")(trainer, MODULE, None, BATCH, k)
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize(("key", "value"), [("is_global_zero", False), ("fast_dev_run", 1)])
def test_no_progress_of_other_ranks_and_of_trials(
    key: str, value: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed_lines(fake_trainer(Recorder(), **{key: value}), 40, monkeypatch, capsys) == []


def test_no_lines_on_terminals_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rich, "get_console", lambda: SimpleNamespace(is_terminal=True, is_jupyter=False))
    assert printed_lines(fake_trainer(Recorder()), 40, monkeypatch, capsys) == []
    lines = printed_lines(
        fake_trainer(Recorder()), 40, monkeypatch, capsys, every_fraction=0.5, title="trial 7", on_terminals=True
    )
    assert [line.partition(",")[0] for line in lines] == ["trial 7: step 20/40 (50%)", "trial 7: step 40/40 (100%)"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_bar_is_drawn_on_terminals_alone(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr(rich.get_console(), "_force_terminal", is_terminal)
    bar = StepProgressBar()
    bar.setup(fake_trainer(Recorder()), MODULE, "fit")
    assert bar.is_enabled == is_terminal


@pytest.mark.parametrize("options", [{"every_seconds": 0.0}, {"every_fraction": -1.0}])
def test_a_period_of_progress_is_positive(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected every_seconds > 0 and every_fraction > 0"):
        LogProgress(**options)
