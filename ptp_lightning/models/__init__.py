"""Networks: backbones, gated LoRA, auxiliary embeddings, and the predictor they make up."""

from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.conditioning import SamplingRange
from ptp_lightning.models.continuous_features import (
    CosineFeatures,
    FourierFeatures,
    LinearInterpolationFeatures,
    MultiscaleHatFeatures,
    RawFloatFeatures,
    SawtoothFeatures,
    ScaleFreeCosineFeatures,
)
from ptp_lightning.models.gated_lora import LoraSettings
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.models.predictor_config import PredictorConfig
from ptp_lightning.models.refiner import RefinerSettings
from ptp_lightning.models.slots import (
    CategoricalObjective,
    IndependentObjective,
    OneHotObjective,
    SequentialObjective,
)
from ptp_lightning.models.stepped_features import (
    ArithmeticFeatures,
    BinaryFeatures,
    FloatBitFeatures,
    RoundingFeatures,
    ThresholdFeatures,
)
from ptp_lightning.models.students import FullCopyStudent, GatedLoraStudent, SharedStudent

__all__ = [
    "ArithmeticFeatures",
    "BackboneSettings",
    "BinaryFeatures",
    "CategoricalObjective",
    "CosineFeatures",
    "FloatBitFeatures",
    "FourierFeatures",
    "FullCopyStudent",
    "GatedLoraStudent",
    "IndependentObjective",
    "LinearInterpolationFeatures",
    "LoraSettings",
    "MultiscaleHatFeatures",
    "OneHotObjective",
    "ParallelTokenPredictor",
    "PredictorConfig",
    "RawFloatFeatures",
    "RefinerSettings",
    "RoundingFeatures",
    "SamplingRange",
    "SawtoothFeatures",
    "ScaleFreeCosineFeatures",
    "SequentialObjective",
    "SharedStudent",
    "ThresholdFeatures",
]
