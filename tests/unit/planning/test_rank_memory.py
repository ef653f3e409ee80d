"""Memory of one of several GPUs, in numbers that can be added by hand."""

from collections import Counter

import pytest

from ptp_lightning.models.students import FullCopyStudent, GatedLoraStudent, Student
from ptp_lightning.planning.memory_tracker import ACTIVATIONS
from ptp_lightning.planning.rank_memory import (
    BUCKETS,
    GATHERED,
    SAVED,
    TEMPORARY,
    LayerGroups,
    layer_groups,
    replicated,
    sharded,
)
from ptp_lightning.planning.step_memory import FROZEN, GRADIENTS, STATES, TRAINED, StepMemory
from tests.helpers.tiny_distillation import LLAMA, make_module

STEP = StepMemory(
    parts={FROZEN: 80, TRAINED: 16, GRADIENTS: 16, STATES: 32},
    saved=50,
    peaks={
        "forward": Counter({GRADIENTS: 16, ACTIVATIONS: 60}),
        "backward": Counter({GRADIENTS: 4, ACTIVATIONS: 70}),
        "optimizer step": Counter({GRADIENTS: 16, ACTIVATIONS: 8}),
    },
)
GROUPS = LayerGroups(layer=10, layer_gradients=3, rest=7)


def test_one_gpu_at_the_largest_stage() -> None:
    memory = replicated(STEP, 1)
    assert memory.parts == {FROZEN: 80, TRAINED: 16, GRADIENTS: 16, STATES: 32, SAVED: 50, TEMPORARY: 10}
    assert memory.total == 204  # of the forward pass; in the backward pass it is 202


def test_ddp_adds_a_copy_of_the_gradients() -> None:
    memory = replicated(STEP, 2)
    assert memory.parts[BUCKETS] == 16
    assert memory.total == 220


def test_shards_and_two_gathered_layers() -> None:
    memory = sharded(STEP, GROUPS, 8)
    assert memory.parts == {FROZEN: 10, TRAINED: 2, GRADIENTS: 1, STATES: 4, GATHERED: 30, SAVED: 50, TEMPORARY: 20}
    assert memory.total == 117  # of the backward pass; in the forward pass it is 105


def test_a_validation_saves_no_activations() -> None:
    memory = replicated(STEP._replace(peaks={**STEP.peaks, "validation": Counter({GRADIENTS: 16, ACTIVATIONS: 61})}), 1)
    assert memory.parts == {FROZEN: 80, TRAINED: 16, GRADIENTS: 16, STATES: 32, SAVED: 0, TEMPORARY: 61}


@pytest.mark.parametrize("student", [GatedLoraStudent(), FullCopyStudent()])
def test_groups_are_layers_with_their_adapters_and_the_rest(student: Student) -> None:
    module = make_module(LLAMA | {"num_hidden_layers": 3}, student=student)
    sizes = {name: 4 * parameter.numel() for name, parameter in module.named_parameters()}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    first = [name for name in sizes if ".layers.0." in name and "correction" not in name]
    if isinstance(student, FullCopyStudent):
        first = [name for name in first if "student_copy" in name]
    layers = [name for name in sizes if ".layers." in name and "correction" not in name]
    groups = layer_groups(module)
    assert groups.layer == sum(sizes[name] for name in first)
    assert groups.layer_gradients == sum(sizes[name] for name in first if name in trained)
    assert groups.rest == sum(sizes.values()) - sum(sizes[name] for name in layers)
