"""Networks: backbones, gated LoRA, auxiliary embeddings, and the predictor they make up."""

from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner
from ptp_lightning.models.correction.markov_head import MarkovHead
from ptp_lightning.models.correction.token_conditioned_head import TokenConditionedHead
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.continuous_features import (
    CosineFeatures,
    FourierFeatures,
    LinearInterpolationFeatures,
    MultiscaleHatFeatures,
    RawFloatFeatures,
    SawtoothFeatures,
    ScaleFreeCosineFeatures,
)
from ptp_lightning.models.slots.objectives import (
    CategoricalObjective,
    IndependentObjective,
    OneHotObjective,
    SequentialObjective,
)
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.models.slots.stepped_features import (
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
    "DecoderRefiner",
    "FloatBitFeatures",
    "FourierFeatures",
    "FullCopyStudent",
    "GatedLoraStudent",
    "IndependentObjective",
    "LinearInterpolationFeatures",
    "LoraSettings",
    "MarkovHead",
    "MultiscaleHatFeatures",
    "OneHotObjective",
    "PredictorConfig",
    "PredictorNetwork",
    "RawFloatFeatures",
    "RoundingFeatures",
    "SamplingRange",
    "SawtoothFeatures",
    "ScaleFreeCosineFeatures",
    "SequentialObjective",
    "SharedStudent",
    "ThresholdFeatures",
    "TokenConditionedHead",
]
