"""The memory of a step on fake tensors is that of a real step, by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import CrossEntropy, KullbackLeibler
from ptp_lightning.models.correction.decoder_refiner import DecoderRefiner
from ptp_lightning.models.lora.gated_lora import LoraSettings
from ptp_lightning.models.slots.objectives import OneHotObjective
from ptp_lightning.models.students import FullCopyStudent
from ptp_lightning.planning.command import full_batch
from ptp_lightning.planning.fake_tensors import fake_execution, meta_modules
from ptp_lightning.planning.memory_tracker import ACTIVATIONS
from ptp_lightning.planning.rank_memory import replicated
from ptp_lightning.planning.step_memory import StepMemory, measure_step
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from tests.helpers.tiny_distillation import make_module

TOLERANCE = 0.05  # workspaces of kernels are not counted; the promise for a plan is 15 %
NETWORK = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SIZES = SimpleNamespace(batch_size=2, row_length=64, num_windows=8)
SETTINGS: dict[str, dict[str, Any]] = {
    "activations": {"objective": OneHotObjective(), "loss": CrossEntropy(), "lora": LoraSettings(rank=16)},
    # Mostly weights, gradients and optimizer states.
    "weights": {
        "student": FullCopyStudent(),
        "window_length": 2,
        "correction": None,
        "loss": KullbackLeibler(chunk_size=16),
    },
    # Mostly logits: the vocabulary is much larger than everything else.
    "logits": {
        "backbone": NETWORK | {"vocab_size": 32768, "hidden_size": 32, "intermediate_size": 32},
        "source": DatasetWindows(),
        "sampling": SamplingConfig(),  # gives every token a probability above 0, so that no token is masked
        "correction": None,
    },
}


def make(settings: dict[str, Any]) -> DistillationModule:
    module = make_module(**({"backbone": NETWORK, "window_length": 8} | settings))
    module.end_of_text = None
    return module


def measured(settings: dict[str, Any], **options: bool) -> StepMemory:
    """Measure on fake tensors."""
    with meta_modules():
        module = make(settings)
    with fake_execution(module, on_gpu=False):
        return measure_step(module, full_batch(SIZES), **options)


def allocated(work: Callable[[], None]) -> int:
    """Peak memory of torch's allocator, from the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    events: list[Any] = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@pytest.fixture
def with_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attributes of the trainer that a training step reads."""
    trainer: Any = SimpleNamespace(
        estimated_stepping_batches=2,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor),
    )
    entries = {"trainer": trainer, "global_step": 0, "global_rank": 0, "log": lambda *args, **options: None}
    for name, entry in entries.items():
        monkeypatch.setattr(DistillationModule, name, entry)


def real_batch() -> PackedBatch:
    batch = full_batch(SIZES)
    return batch._replace(input_ids=torch.randint(2048, batch.input_ids.shape))


def real_steps(module: DistillationModule, *, accumulates: bool = False) -> Callable[[], None]:
    """Two optimiser steps in Lightning's order: gradients are removed between the forward and the backward pass.

    With accumulation they are kept.
    """
    batch = real_batch()
    optimizer: Any = module.configure_optimizers()

    def work() -> None:
        for _ in range(2):
            loss = module.training_step(batch, 0)
            if not accumulates:
                optimizer["optimizer"].zero_grad()
            loss.backward()
            del loss
            optimizer["optimizer"].step()

    return work


@pytest.mark.usefixtures("with_trainer")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_estimate_is_the_memory_of_a_real_step(settings: dict[str, Any]) -> None:
    expected = replicated(measured(settings), 1).total
    module = make(settings)
    weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    found = weights + allocated(real_steps(module))
    assert expected == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.usefixtures("with_trainer")
def test_accumulated_gradients_exist_in_the_backward_pass() -> None:
    settings = SETTINGS["weights"] | {"loss": KullbackLeibler(), "window_length": 4}
    one, several = (measured(settings, accumulates=accumulates) for accumulates in (False, True))
    assert one.peaks["backward"].total() < several.peaks["backward"].total()
    module = make(settings)
    weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    found = weights + allocated(real_steps(module, accumulates=True))
    assert replicated(several, 1).total == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.usefixtures("with_trainer")
def test_the_estimate_of_a_validation_step() -> None:
    settings = SETTINGS["activations"] | {"correction": DecoderRefiner(num_layers=1, num_refinement_steps=1)}
    expected = measured(settings, validates=True).peaks["validation"][ACTIVATIONS]
    module, batch = make(settings).eval(), real_batch()

    @torch.no_grad()
    def validate() -> None:
        module.validation_step(batch, 0)

    assert expected == pytest.approx(allocated(validate), rel=TOLERANCE)
