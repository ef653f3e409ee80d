"""StepMemory: the memory of one training step, measured while it runs."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from lightning import LightningModule, Trainer

from ptp_lightning.batch import PackedBatch
from ptp_lightning.planning.memory_tracker import ACTIVATIONS, MemoryTracker

FROZEN, TRAINED, GRADIENTS, STATES = "frozen parameters", "trained parameters", "gradients", "optimizer states"

FORWARD, BACKWARD = "forward", "backward"


class StepMemory(NamedTuple):
    """Memory of a training step after the first one, on one device with the whole model, in bytes.

    Attributes:
        parts: permanent: frozen parameters (and buffers), trained parameters, all gradients, all optimizer states.
        saved: activations saved by the forward pass for the backward pass.
        peaks: by stage (forward, backward, optimizer step, validation), the existing gradients and the activations at
            the peak of the stage.
    """

    parts: dict[str, int]
    saved: int
    peaks: dict[str, Counter[str]]


def measure_step(
    module: LightningModule,
    batch: PackedBatch,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    on_gpu: bool = False,
    validates: bool = False,
    accumulates: bool = False,
) -> StepMemory:
    """Run the module's training step and its optimizer, in Lightning's order, and track the memory.

    Lightning removes the gradients of a step after the forward pass of the next step.

    Args:
        module: in training mode; its parameters get gradients.
        batch: on the module's device.
        forward_context: of the trainer's precision.
        on_gpu: let the optimizer update all parameters at once, as is torch's default on GPUs, which needs more memory.
        validates: also measure a validation step of the same batch.
        accumulates: measure a batch after the first of an accumulated step: gradients exist in its backward pass.
    """
    tracker = MemoryTracker()
    with silent_trainer(module), tracker:
        parameters = list(module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        tracker.assign(TRAINED, trained)
        tracker.assign(FROZEN, [tensor for tensor in (*parameters, *module.buffers()) if not tensor.requires_grad])
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda owner: tracker.assign(GRADIENTS, [] if owner.grad is None else [owner.grad])
            )
        peaks: dict[str, Counter[str]] = {}
        tracker.reset_peak()
        with forward_context():
            loss = cast(torch.Tensor, module.training_step(batch, 0))
        peaks[FORWARD], saved = tracker.peak, tracker.current[ACTIVATIONS]
        tracker.reset_peak()
        loss.backward()
        peaks[BACKWARD] = tracker.peak
        del loss
        optimizer = cast(Any, module.configure_optimizers())["optimizer"]
        if on_gpu:
            for group in optimizer.param_groups:
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
        with tracker.category(STATES):
            optimizer.step()
        tracker.reset_peak()
        optimizer.step()
        peaks["optimizer step"] = tracker.peak
        if validates:
            module.eval()
            tracker.reset_peak()
            with torch.no_grad(), forward_context():
                cast(Any, module).validation_step(batch, 0)
            peaks["validation"] = tracker.peak
            module.train()
        parts = {kind: tracker.current[kind] for kind in (FROZEN, TRAINED, GRADIENTS, STATES)}
    for stage in (FORWARD, BACKWARD) if accumulates else (FORWARD,):
        peaks[stage][GRADIENTS] = parts[GRADIENTS]
    for peak in peaks.values():
        for category in (FROZEN, TRAINED, STATES):
            del peak[category]
    return StepMemory(parts, saved, peaks)


@contextmanager
def silent_trainer(module: LightningModule) -> Iterator[None]:
    """Attach a trainer without output, from which the module reads its step and rank."""
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    previous = messages.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*barebones.*")
        messages.setLevel(logging.ERROR)
        try:
            module.trainer = Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=-1, max_steps=1)
            yield
        finally:
            messages.setLevel(previous)
