"""RankMemory: memory of a training step on each of several GPUs, with a replicated or a sharded model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ptp_lightning.planning.memory_tracker import ACTIVATIONS
from ptp_lightning.planning.step_memory import BACKWARD, FORWARD, FROZEN, GRADIENTS, STATES, TRAINED, StepMemory
from ptp_lightning.training.modules.training_module import TrainingModule

BUCKETS = "DDP gradient buckets"
GATHERED = "all-gathered layers"
SAVED = "activations saved for the backward pass"
TEMPORARY = "temporary tensors"
ROWS = (FROZEN, TRAINED, GRADIENTS, BUCKETS, STATES, GATHERED, SAVED, TEMPORARY)

NUM_GATHERED_LAYERS = 2  # the layer that computes, and the next one, which is prefetched


class LayerGroups(NamedTuple):
    """Bytes of the parameter groups of FSDP2.

    Attributes:
        layer: parameters of the largest decoder layer.
        layer_gradients: gradients of the trained parameters of a decoder layer, at most.
        rest: parameters outside the decoder layers, which stay gathered from the forward to the backward pass.
    """

    layer: int
    layer_gradients: int
    rest: int


@dataclass(frozen=True)
class RankMemory:
    """Peak memory of one GPU, in bytes.

    Attributes:
        parts: by category; keys are among `ROWS`.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())


def replicated(step: StepMemory, num_ranks: int) -> RankMemory:
    """Memory if every GPU holds the whole model; with several GPUs, DDP adds a copy of all gradients."""
    buckets = {BUCKETS: step.parts[GRADIENTS]} if num_ranks > 1 else {}

    def at(stage: str) -> RankMemory:
        return RankMemory(
            {kind: step.parts[kind] for kind in (FROZEN, TRAINED)}
            | {GRADIENTS: step.peaks[stage][GRADIENTS]}
            | buckets
            | {STATES: step.parts[STATES]}
            | _activations(step, stage)
        )

    return _largest(at(stage) for stage in step.peaks)


def sharded(step: StepMemory, groups: LayerGroups, num_ranks: int) -> RankMemory:
    """Memory with FSDP2: parameters, gradients and optimizer states are sharded, and layers gathered to compute."""

    def at(stage: str) -> RankMemory:
        gathered = groups.rest + NUM_GATHERED_LAYERS * groups.layer
        if stage == BACKWARD:
            gathered += groups.layer_gradients
        return RankMemory(
            {kind: -(-step.parts[kind] // num_ranks) for kind in (FROZEN, TRAINED)}
            | {GRADIENTS: -(-step.peaks[stage][GRADIENTS] // num_ranks)}
            | {STATES: -(-step.parts[STATES] // num_ranks)}
            | {GATHERED: gathered}
            | _activations(step, stage)
        )

    return _largest(at(stage) for stage in step.peaks)


def layer_groups(module: TrainingModule) -> LayerGroups:
    """Sizes of the decoder layers of all networks in a module, and of the other parameters."""
    layers = module.decoder_layers("plan for another base model")
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    return LayerGroups(
        layer=max(_num_bytes(layer.parameters()) for layer in layers),
        layer_gradients=max(
            _num_bytes(parameter for parameter in layer.parameters() if parameter.requires_grad) for layer in layers
        ),
        rest=_num_bytes(rest),
    )


def _activations(step: StepMemory, stage: str) -> dict[str, int]:
    """Activations in two parts."""
    total = step.peaks[stage][ACTIVATIONS]
    saved = min(step.saved, total) if stage in (FORWARD, BACKWARD) else 0
    return {SAVED: saved, TEMPORARY: total - saved}


def _largest(candidates: Iterable[RankMemory]) -> RankMemory:
    return max(candidates, key=lambda memory: memory.total)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
