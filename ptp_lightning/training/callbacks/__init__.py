"""Callbacks that report a run: progress, charts by position, speed, hyperparameters with results, a final summary.

They read `val_summary`, the `WindowSummary` that a module sets at the end of each validation epoch. They do nothing for
modules without one, and those for TensorBoard do nothing without a `TensorBoardLogger` (so `fast_dev_run` is not a
special case). They write on rank zero only.
"""

from ptp_lightning.training.callbacks.final_metrics import FinalMetrics, RunSettings
from ptp_lightning.training.callbacks.learning_rate import LearningRate
from ptp_lightning.training.callbacks.log_progress import LogProgress
from ptp_lightning.training.callbacks.position_charts import PositionCharts
from ptp_lightning.training.callbacks.run_summary import RunSummary
from ptp_lightning.training.callbacks.run_text import RunText
from ptp_lightning.training.callbacks.step_progress_bar import StepProgressBar
from ptp_lightning.training.callbacks.training_speed import TrainingSpeed
from ptp_lightning.training.callbacks.validated_checkpoint import ValidatedCheckpoint

__all__ = [
    "FinalMetrics",
    "LearningRate",
    "LogProgress",
    "PositionCharts",
    "RunSettings",
    "RunSummary",
    "RunText",
    "StepProgressBar",
    "TrainingSpeed",
    "ValidatedCheckpoint",
]
