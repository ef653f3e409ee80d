"""PredictorConfig: everything that makes a predictor, apart from trained weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.models.correction.correction import Correction, HeadCorrection
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.models.slots.continuous_features import CosineFeatures
from ptp_lightning.models.slots.objectives import CategoricalObjective, Objective
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.models.stored_classes import class_path_of, require_trusted_classes, with_public_names
from ptp_lightning.models.students import GatedLoraStudent, Student
from ptp_lightning.ngrams import MAX_NGRAMS
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.user_errors import plain_reason

CHOSEN_BY_CLASS = ("objective", "features", "student", "correction")
"""Fields of `PredictorConfig` that a configuration chooses by `class_path`."""
NEVER_NULL = ("backbone", "objective", "features", "lora", "sampling", "student")
TEXT_FIELDS = ("head",)
MAX_SLOTS = 2**12
"""Largest number of slots of a window, and of a call. Memory is allocated for their logits at once: 0.8 GB for those of
a vocabulary of 49,152 tokens in float32."""


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
        correction: predicts a slot's token again, given the token before it (see `Correction`); none by default.
        student: which network runs the slots, and what of it is trained: adapters, a copy, or the base model itself.
        sampling_range: train for all of these settings and tell slots which one is in use; by default `sampling` alone.
        draft_vocabulary: N, the number of tokens that slots can draft: the most frequent ones of the training data.
            It makes the output head of slots cheaper; verification, and with it the text, covers all tokens. None
            for all tokens.
        slot_layers: number of the last layers of the base model that slots run through, and that carry the adapter.
            What the layers below make of the text reaches slots by hidden states of the token before (`LateEntry`), so
            that drafts cost less. They are for speculative decoding alone. None for all layers; 0 for slots that are
            made of these hidden states alone (`LayerlessSlots`), without an adapter in the base model.
        ngrams: number of n-grams that are counted in training data and stored: what usually follows one or two tokens.
            Decoders with a lookup draft from them where that is cheaper than asking the student. None for none.

    Raises:
        ValueError: a size is out of range, `sampling` is not one of the settings to be trained for, or a correction
            does not suit the objective.
    """

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    objective: Objective = field(default_factory=CategoricalObjective)
    features: AuxiliaryFeatures = field(default_factory=CosineFeatures)
    head: Literal["linear", "mlp"] = "mlp"
    lora: LoraSettings = field(default_factory=LoraSettings)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    window_length: int = 16
    correction: Correction | None = None
    student: Student = field(default_factory=GatedLoraStudent)
    sampling_range: SamplingRange | None = None
    draft_vocabulary: int | None = None
    slot_layers: int | None = None
    ngrams: int | None = None

    def __post_init__(self) -> None:
        for name in NEVER_NULL:
            if getattr(self, name) is None:
                raise ValueError(f"expected settings of predictor.{name}, found null: leave it out for its defaults")
        if self.window_length < 2:
            raise ValueError(
                f"expected predictor.window_length >= 2 (the first token needs no slot), found {self.window_length}"
            )
        if self.window_length > MAX_SLOTS:
            raise ValueError(f"expected predictor.window_length <= {MAX_SLOTS}, found {self.window_length}")
        if self.sampling.depends_on_prefix:
            raise ValueError(
                "expected predictor.sampling without repetition_penalty and no_repeat_ngram_size, which depend on all "
                f"tokens before and are not learned, found {self.sampling}: give them to generate instead"
            )
        if not self.is_trained_for(self.sampling):
            raise ValueError(
                f"expected predictor.sampling, the settings that are used by default, within predictor.sampling_range, "
                f"found {self.sampling} outside {self.sampling_range}: widen the range"
            )
        if self.draft_vocabulary is not None and self.draft_vocabulary < 1:
            raise ValueError(f"expected predictor.draft_vocabulary null or >= 1, found {self.draft_vocabulary}")
        if self.ngrams is not None and not 1 <= self.ngrams <= MAX_NGRAMS:
            raise ValueError(f"expected predictor.ngrams null or in 1 .. {MAX_NGRAMS}, found {self.ngrams}")
        if self.slot_layers is not None:
            if self.slot_layers < 0:
                raise ValueError(f"expected predictor.slot_layers null or >= 0, found {self.slot_layers}")
            if not isinstance(self.student, GatedLoraStudent):
                raise ValueError(
                    "expected predictor.student GatedLoraStudent, whose slots run in the base model, beside "
                    f"predictor.slot_layers, found {type(self.student).__name__}: set predictor.slot_layers to null"
                )
        if isinstance(self.correction, HeadCorrection) and not self.objective.conditions_on_draft:
            raise ValueError(
                f"expected a predictor.objective that is conditioned on drafted tokens beside predictor.correction "
                f"{type(self.correction).__name__}, which corrects by them, found {type(self.objective).__name__}: "
                "set predictor.objective to ptp_lightning.models.SequentialObjective, or predictor.correction to null"
            )

    def is_trained_for(self, sampling: SamplingConfig) -> bool:
        """Whether slots learn these settings."""
        if self.sampling_range is None:
            return sampling == self.sampling
        return sampling.order == self.sampling.order and self.sampling_range.covers(sampling)

    @property
    def has_lora(self) -> bool:
        """Whether layers of the base model carry an adapter, of the size that `lora` says."""
        return isinstance(self.student, GatedLoraStudent) and self.slot_layers != 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` and YAML files understand."""
        return (asdict(self) | {"sampling": self.sampling.to_dict()}) | {
            name: {"class_path": class_path_of(part), "init_args": asdict(part)}
            for name, part in self._parts_by_class().items()
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any], *, trusted_classes: Collection[str] | None = ()) -> PredictorConfig:
        """Inverse of `to_dict`; also of data that name our classes by files where they stand or stood.

        Args:
            plain: the data.
            trusted_classes: class paths that may be imported besides this package's own; None allows all.

        Raises:
            ValueError: a class that is not trusted, unknown keys or values of the wrong type.
        """
        from jsonargparse import ArgumentParser

        plain = with_public_names(plain)
        if trusted_classes is not None:
            require_trusted_classes(plain, TEXT_FIELDS, trusted_classes)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "predictor")
        try:
            return parser.instantiate(parser.parse_object({"predictor": plain}))["predictor"]
        except Exception as error:  # jsonargparse raises ArgumentError, TypeError or ValueError by cause
            reason = " ".join(plain_reason(str(error)).split())
            raise ValueError(
                f"expected the configuration of a predictor, found one that does not fit: {reason}"
            ) from error

    def class_paths(self) -> set[str]:
        """Class paths of the parts that a configuration chooses by class."""
        return {class_path_of(part) for part in self._parts_by_class().values()}

    def _parts_by_class(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in CHOSEN_BY_CLASS}
        return {name: part for name, part in parts.items() if part is not None}
