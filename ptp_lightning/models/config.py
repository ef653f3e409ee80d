"""PredictorConfig: everything that makes a predictor, apart from trained weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.refiner.refiner import RefinerSettings
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.models.slots.continuous_features import CosineFeatures
from ptp_lightning.models.slots.objectives import CategoricalObjective, Objective
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.models.students import GatedLoraStudent, Student
from ptp_lightning.sampling import SamplingConfig

PUBLIC_HOME = "ptp_lightning.models"


@dataclass(frozen=True)
class PredictorConfig:
    """Everything that makes a predictor, apart from trained weights.

    Args:
        backbone: the base model, which is the teacher too.
        objective: what slots carry and propose.
        features: features of an auxiliary.
        head: the trained map from features to the model's embedding space.
        lora: size of the adapter, where the student has one.
        sampling: the distribution of the base model that is imitated; intervals and targets are defined by it.
        window_length: L, tokens predicted in one call; the first is exact, L - 1 come from slots.
        refiner: layers after the stack that are told the slots' tokens (see `Refiner`); none by default.
        student: which network runs the slots, and what of it is trained: adapters, a copy, or the base model itself.
        sampling_range: train for all of these settings and tell slots which one is in use; by default `sampling` alone.

    Raises:
        ValueError: windows have no slots, or `sampling` is not one of the settings to be trained for.
    """

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    objective: Objective = field(default_factory=CategoricalObjective)
    features: AuxiliaryFeatures = field(default_factory=CosineFeatures)
    head: Literal["linear", "mlp"] = "mlp"
    lora: LoraSettings = field(default_factory=LoraSettings)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    window_length: int = 16
    refiner: RefinerSettings = field(default_factory=RefinerSettings)
    student: Student = field(default_factory=GatedLoraStudent)
    sampling_range: SamplingRange | None = None

    def __post_init__(self) -> None:
        if self.window_length < 2:
            raise ValueError(
                f"expected predictor.window_length >= 2 (the first token needs no slot), found {self.window_length}"
            )
        if not self.is_trained_for(self.sampling):
            raise ValueError(
                f"expected predictor.sampling, the settings that are used by default, within predictor.sampling_range, "
                f"found {self.sampling} outside {self.sampling_range}: widen the range"
            )

    def is_trained_for(self, sampling: SamplingConfig) -> bool:
        """Whether slots learn these settings."""
        if self.sampling_range is None:
            return sampling == self.sampling
        return sampling.order == self.sampling.order and self.sampling_range.covers(sampling)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` and YAML files understand."""
        chosen = {"objective": self.objective, "features": self.features, "student": self.student}
        return asdict(self) | {
            name: {"class_path": _class_path(type(value)), "init_args": asdict(value)} for name, value in chosen.items()
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> PredictorConfig:
        """Inverse of `to_dict`; also of data that name our classes by files where they stand or stood.

        Raises:
            ValueError: unknown keys or values of the wrong type.
        """
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "predictor")
        try:
            plain = {key: _with_public_name(value) for key, value in plain.items()}
            return parser.instantiate(parser.parse_object({"predictor": plain}))["predictor"]
        except Exception as error:  # jsonargparse raises ArgumentError, TypeError or ValueError by cause
            raise ValueError(
                f"expected the configuration of a predictor, found one that does not fit: {error}"
            ) from error


def _class_path(chosen: type) -> str:
    """As configurations name the class."""
    return _public_name(f"{chosen.__module__}.{chosen.__qualname__}")


def _with_public_name(entry: object) -> object:
    """An entry of the plain data, whose class is renamed if it names one."""
    if isinstance(entry, dict) and "class_path" in entry:
        return entry | {"class_path": _public_name(entry["class_path"])}
    return entry


def _public_name(class_path: str) -> str:
    """Our own classes by their public home, which stays when files are moved; others as they are."""
    ours = class_path.startswith(f"{PUBLIC_HOME}.")
    return f"{PUBLIC_HOME}.{class_path.rpartition('.')[2]}" if ours else class_path
