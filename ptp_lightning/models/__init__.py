"""Networks: backbones, gated LoRA, auxiliary embeddings, and the predictor they make up."""

from ptp_lightning.models.auxiliary_embedding import BinaryFeatures, CosineFeatures
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.gated_lora import LoraSettings
from ptp_lightning.models.predictor import ParallelTokenPredictor, PredictorConfig
from ptp_lightning.models.refiner import RefinerSettings
from ptp_lightning.models.slots import (
    CategoricalObjective,
    IndependentObjective,
    OneHotObjective,
    SequentialObjective,
)

__all__ = [
    "BackboneSettings",
    "BinaryFeatures",
    "CategoricalObjective",
    "CosineFeatures",
    "IndependentObjective",
    "LoraSettings",
    "OneHotObjective",
    "ParallelTokenPredictor",
    "PredictorConfig",
    "RefinerSettings",
    "SequentialObjective",
]
