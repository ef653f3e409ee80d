"""LightningModules: distillation, pretraining, and what they share."""

from ptp_lightning.training.distributed.strategies import FullyShardedStrategy
from ptp_lightning.training.modules.autoregressive import AutoregressiveModule
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.modules.inverse_autoregressive import InverseAutoregressiveModule
from ptp_lightning.training.modules.training_module import TrainingModule
from ptp_lightning.training.optimization import OptimizerSettings
from ptp_lightning.training.windows.analytic_windows import AnalyticWindows
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.training.windows.mixture_windows import MixtureWindows
from ptp_lightning.training.windows.student_windows import StudentWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource

__all__ = [
    "AnalyticWindows",
    "AutoregressiveModule",
    "DatasetWindows",
    "DistillationModule",
    "FullyShardedStrategy",
    "InverseAutoregressiveModule",
    "MixtureWindows",
    "OptimizerSettings",
    "StudentWindows",
    "TeacherWindows",
    "TrainingModule",
    "WindowSample",
    "WindowSource",
]
