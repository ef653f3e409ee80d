"""Parallel Token Prediction: train, decode exactly, ablate. The public names, each imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptp_lightning.auxiliary import pick, token_interval
    from ptp_lightning.batch import PackedBatch
    from ptp_lightning.data.datamodule import CorpusDataModule
    from ptp_lightning.models.config import PredictorConfig
    from ptp_lightning.predictor import ParallelTokenPredictor
    from ptp_lightning.sampling import SamplingConfig
    from ptp_lightning.training.modules.autoregressive import AutoregressiveModule
    from ptp_lightning.training.modules.distillation import DistillationModule
    from ptp_lightning.training.modules.inverse_autoregressive import InverseAutoregressiveModule

__version__ = "0.2.0"

__all__ = [
    "AutoregressiveModule",
    "CorpusDataModule",
    "DistillationModule",
    "InverseAutoregressiveModule",
    "PackedBatch",
    "ParallelTokenPredictor",
    "PredictorConfig",
    "SamplingConfig",
    "__version__",
    "pick",
    "token_interval",
]

# torch, transformers and Lightning take seconds to import, so their users wait until they are asked for.
_HOMES = {
    "AutoregressiveModule": "training.modules.autoregressive",
    "CorpusDataModule": "data.datamodule",
    "DistillationModule": "training.modules.distillation",
    "InverseAutoregressiveModule": "training.modules.inverse_autoregressive",
    "PackedBatch": "batch",
    "ParallelTokenPredictor": "predictor",
    "PredictorConfig": "models.config",
    "SamplingConfig": "sampling",
    "pick": "auxiliary",
    "token_interval": "auxiliary",
}


def __getattr__(name: str) -> object:
    """A public name, from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names too, imported or not."""
    return sorted(globals().keys() | _HOMES)
