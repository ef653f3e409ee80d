"""Students: which network runs the slots, and which of its weights are trained.

A new student is a frozen dataclass with `attach`, and one `class_path` line of YAML.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ptp_lightning.models.lora.gate import Gate
from ptp_lightning.models.lora.gated_lora import LoraSettings, add_gated_lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class AttachedStudent(NamedTuple):
    """The networks of a predictor.

    Attributes:
        language_model: the base model, which is the teacher, with the adapter if the student is one.
        gate: of the adapter; without an adapter it controls nothing.
        copy: the network that runs the slots, None if the base model does.
    """

    language_model: PreTrainedModel | PeftModel
    gate: Gate
    copy: PreTrainedModel | None


@dataclass(frozen=True)
class Student(ABC):
    """How the network that runs the slots is made from the base model."""

    name: ClassVar[str]
    trains_base: ClassVar[bool]
    """Whether the base model itself is trained, so that there is no fixed teacher."""

    @abstractmethod
    def attach(self, base: PreTrainedModel, lora: LoraSettings, first_layer: int) -> AttachedStudent:
        """Make the networks, in eval mode, and set `requires_grad` on what is trained.

        Args:
            base: the base model, changed in place.
            lora: size of the adapter; not read by students without one.
            first_layer: index of the first decoder layer that slots run through; 0 unless the base model runs them, and
                the number of layers if they run through none.
        """


@dataclass(frozen=True)
class GatedLoraStudent(Student):
    """The frozen base model with low-rank adapters that act on slots only; their size is `predictor.lora`.

    Slots attend to the base model's own keys and values, so one call runs teacher and student. Slots that run through
    no layer (`predictor.slot_layers` 0) need no adapter: then the base model is frozen as it is.
    """

    name: ClassVar[str] = "gated_lora"
    trains_base: ClassVar[bool] = False

    def attach(self, base: PreTrainedModel, lora: LoraSettings, first_layer: int) -> AttachedStudent:
        """See `Student.attach`."""
        if first_layer == base.config.get_text_config().num_hidden_layers:
            return AttachedStudent(base.requires_grad_(False), Gate(), copy=None)
        language_model, gate = add_gated_lora(base, lora, first_layer)
        return AttachedStudent(language_model, gate, copy=None)


@dataclass(frozen=True)
class FullCopyStudent(Student):
    """A copy of the whole base model, all of it trained, that encodes the context itself (the paper's NYC students).

    It starts from the base model's weights, in float32 even if those are bfloat16; tied weights stay tied. The base
    model stays the frozen teacher. Decoding runs both, each with its own KV cache. `predictor.lora` is not read.
    """

    name: ClassVar[str] = "full_copy"
    trains_base: ClassVar[bool] = False

    def attach(self, base: PreTrainedModel, lora: LoraSettings, first_layer: int) -> AttachedStudent:
        """See `Student.attach`."""
        student = copy.deepcopy(base).float().requires_grad_(True).eval()
        return AttachedStudent(base.requires_grad_(False), Gate(), student)


@dataclass(frozen=True)
class SharedStudent(Student):
    """One network for context and slots, all of it trained, without a separate teacher (teacher-free training).

    It is trained in float32 and without dropout, even if its configuration has some: the auxiliaries of a token are
    defined by the network's own distributions, which dropout would randomise. `predictor.lora` is not read.
    """

    name: ClassVar[str] = "shared"
    trains_base: ClassVar[bool] = True

    def attach(self, base: PreTrainedModel, lora: LoraSettings, first_layer: int) -> AttachedStudent:
        """See `Student.attach`."""
        return AttachedStudent(base.float().requires_grad_(True), Gate(), copy=None)
