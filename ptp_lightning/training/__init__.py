"""LightningModules: distillation, pretraining, and what they share."""

from ptp_lightning.training.analytic_windows import AnalyticWindows
from ptp_lightning.training.distillation import DistillationModule
from ptp_lightning.training.mixture_windows import MixtureWindows
from ptp_lightning.training.optimization import OptimizerSettings
from ptp_lightning.training.pretraining import AutoregressiveModule
from ptp_lightning.training.self_training import InverseAutoregressiveModule
from ptp_lightning.training.strategies import FullyShardedStrategy
from ptp_lightning.training.student_windows import StudentWindows
from ptp_lightning.training.windows import DatasetWindows, TeacherWindows

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
]
