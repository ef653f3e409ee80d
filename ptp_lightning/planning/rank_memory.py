"""RankMemory: what a training step has in memory on each of several GPUs, replicated or sharded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ptp_lightning.planning.live_bytes import OTHER
from ptp_lightning.planning.step_memory import BACKWARD, FORWARD, FROZEN, GRADIENTS, STATES, TRAINED, StepMemory
from ptp_lightning.training.modules.training_module import TrainingModule

BUCKETS = "gradient buckets of DDP"
GATHERED = "layers gathered from all ranks"
KEPT = "activations kept for the backward pass"
WORKING = "working memory"
ROWS = (FROZEN, TRAINED, GRADIENTS, BUCKETS, STATES, GATHERED, KEPT, WORKING)

PREFETCHED = 2  # layers that are whole at the same time: while one computes, the next is gathered


class LayerGroups(NamedTuple):
    """Bytes of what FSDP2 gathers at once.

    Attributes:
        layer: parameters of the largest decoder layer.
        layer_gradients: and their gradients.
        rest: everything outside the decoder layers, which stays whole from the forward pass to the backward pass.
    """

    layer: int
    layer_gradients: int
    rest: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU when most is in use.

    Attributes:
        parts: by what they are for; keys are among `ROWS`.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())


def replicated(step: StepMemory, num_ranks: int) -> RankMemory:
    """Every GPU holds everything; of several, each also holds DDP's copy of all gradients."""
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
    """FSDP2: parameters, gradients and optimiser states are divided, layers gathered while they compute."""

    def at(stage: str) -> RankMemory:
        gathered = groups.rest + PREFETCHED * groups.layer
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
    """Sizes of the decoder layers of all networks in a module, and of what is outside them."""
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
    """What does not stay, in two parts."""
    total = step.peaks[stage][OTHER]
    kept = min(step.kept, total) if stage in (FORWARD, BACKWARD) else 0
    return {KEPT: kept, WORKING: total - kept}


def _largest(candidates: Iterable[RankMemory]) -> RankMemory:
    return max(candidates, key=lambda memory: memory.total)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
