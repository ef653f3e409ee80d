"""What a GPU of several holds, in numbers that can be added up by hand."""

from collections import Counter

import pytest

from ptp_lightning.models.students import FullCopyStudent, GatedLoraStudent, Student
from ptp_lightning.planning.live_bytes import OTHER
from ptp_lightning.planning.rank_memory import (
    BUCKETS,
    GATHERED,
    KEPT,
    WORKING,
    LayerGroups,
    layer_groups,
    replicated,
    sharded,
)
from ptp_lightning.planning.step_memory import FROZEN, GRADIENTS, STATES, TRAINED, StepMemory
from tests.helpers.tiny_distillation import LLAMA, make_module

STEP = StepMemory(
    parts={FROZEN: 80, TRAINED: 16, GRADIENTS: 16, STATES: 32},
    kept=50,
    peaks={
        "forward": Counter({GRADIENTS: 16, OTHER: 60}),
        "backward": Counter({GRADIENTS: 4, OTHER: 70}),
        "optimiser step": Counter({GRADIENTS: 16, OTHER: 8}),
    },
)
GROUPS = LayerGroups(layer=10, layer_gradients=3, rest=7)


def test_one_gpu_holds_everything_and_the_largest_stage_counts() -> None:
    memory = replicated(STEP, 1)
    assert memory.parts == {FROZEN: 80, TRAINED: 16, GRADIENTS: 16, STATES: 32, KEPT: 50, WORKING: 10}
    assert memory.total == 204  # of the forward pass; in the backward pass it is 202


def test_several_gpus_keep_their_gradients_twice() -> None:
    memory = replicated(STEP, 2)
    assert memory.parts[BUCKETS] == 16
    assert memory.total == 220


def test_shards_and_two_layers_that_are_whole() -> None:
    memory = sharded(STEP, GROUPS, 8)
    assert memory.parts == {FROZEN: 10, TRAINED: 2, GRADIENTS: 1, STATES: 4, GATHERED: 30, KEPT: 50, WORKING: 20}
    assert memory.total == 117  # of the backward pass; in the forward pass it is 105


def test_a_validation_keeps_no_activations() -> None:
    memory = replicated(STEP._replace(peaks={**STEP.peaks, "validation": Counter({GRADIENTS: 16, OTHER: 61})}), 1)
    assert memory.parts == {FROZEN: 80, TRAINED: 16, GRADIENTS: 16, STATES: 32, KEPT: 0, WORKING: 61}


@pytest.mark.parametrize("student", [GatedLoraStudent(), FullCopyStudent()])
def test_layers_with_their_adapters_are_groups_and_the_rest_is_one(student: Student) -> None:
    module = make_module(LLAMA | {"num_hidden_layers": 3}, student=student)
    sizes = {name: 4 * parameter.numel() for name, parameter in module.named_parameters()}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    first = [name for name in sizes if ".layers.0." in name and "refiner" not in name]
    if isinstance(student, FullCopyStudent):
        first = [name for name in first if "student_copy" in name]
    layers = [name for name in sizes if ".layers." in name and "refiner" not in name]
    groups = layer_groups(module)
    assert groups.layer == sum(sizes[name] for name in first)
    assert groups.layer_gradients == sum(sizes[name] for name in first if name in trained)
    assert groups.rest == sum(sizes.values()) - sum(sizes[name] for name in layers)
