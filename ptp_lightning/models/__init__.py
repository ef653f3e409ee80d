"""Networks: backbones, gated LoRA, auxiliary embeddings, the predictor they make up, and base classes of its parts."""

from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.correction.correction import Correction, CorrectionHead, CorrectionModule, HeadCorrection
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner
from ptp_lightning.models.correction.markov_head import MarkovHead
from ptp_lightning.models.correction.token_conditioned_head import TokenConditionedHead
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
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
    Objective,
    OneHotObjective,
    PickingObjective,
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
from ptp_lightning.models.students import AttachedStudent, FullCopyStudent, GatedLoraStudent, SharedStudent, Student

__all__ = [
    "ArithmeticFeatures",
    "AttachedStudent",
    "AuxiliaryFeatures",
    "BackboneSettings",
    "BinaryFeatures",
    "CategoricalObjective",
    "Correction",
    "CorrectionHead",
    "CorrectionModule",
    "CosineFeatures",
    "DecoderRefiner",
    "FloatBitFeatures",
    "FourierFeatures",
    "FullCopyStudent",
    "GatedLoraStudent",
    "HeadCorrection",
    "IndependentObjective",
    "LinearInterpolationFeatures",
    "LoraSettings",
    "MarkovHead",
    "MultiscaleHatFeatures",
    "Objective",
    "OneHotObjective",
    "PickingObjective",
    "PredictorConfig",
    "PredictorNetwork",
    "RawFloatFeatures",
    "RoundingFeatures",
    "SamplingRange",
    "SawtoothFeatures",
    "ScaleFreeCosineFeatures",
    "SequentialObjective",
    "SharedStudent",
    "Student",
    "ThresholdFeatures",
    "TokenConditionedHead",
]
