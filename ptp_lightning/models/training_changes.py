"""Everything that is changed in a base model's modules so that windows can be trained, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptp_lightning.models.attention.dispatch import use_window_attention
from ptp_lightning.models.layers.memory_efficient import use_memory_efficient_layers
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.students import AttachedStudent, Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_for_training(model: PreTrainedModel, student: Student, lora: LoraSettings) -> AttachedStudent:
    """Change a base model, in place, so that a student learns windows.

    1. The *attention function* of the model becomes one that can read windows: each slot sees the context before its
       window and the slots before it, which no mask of transformers says without a square of all slots.
    2. *Norms and rotary attention* are replaced by versions that make fewer intermediates (`SUPPORTED_NORMS`,
       `SUPPORTED_ATTENTION`): x % less peak memory in a training step at the same speed.
    3. Of a student that is an adapter, each adapted *linear layer* becomes a `GatedLoraLinear`: its update acts on
       slots alone, and context tokens get the base model's own hidden states, bit for bit.
    4. With an adapter, *SwiGLU MLPs* (`SUPPORTED_MLPS`) become a `GatedLoraMLP`, which saves x, gate(x) and up(x) for
       the backward pass and recomputes the rest.

    The first is a registration that transformers offers. The others replace a module by one of ours that takes over its
    weights under their names (`replace_modules` says why no `forward` is patched). What decoding changes is listed in
    its own function. Activation checkpointing and compilation are options of the training modules.

    Args:
        model: the base model.
        student: whose network runs the slots.
        lora: size of the adapter, for students that have one.

    Returns:
        The networks of the predictor.
    """
    if use_window_attention(model):
        use_memory_efficient_layers(model)
    return student.attach(model, lora)
