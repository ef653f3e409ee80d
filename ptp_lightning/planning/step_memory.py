"""StepMemory: what one training step has in memory, measured while it runs."""

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
from ptp_lightning.planning.live_bytes import OTHER, LiveBytes

FROZEN, TRAINED, GRADIENTS, STATES = "frozen parameters", "trained parameters", "gradients", "optimiser states"

FORWARD, BACKWARD = "forward", "backward"


class StepMemory(NamedTuple):
    """Bytes of a training step after the first, on one device that holds everything.

    Attributes:
        parts: that stay: frozen parameters (and buffers), trained parameters, all gradients, all optimiser states.
        kept: activations that the forward pass leaves for the backward pass.
        peaks: by stage (forward, backward, optimiser step, validation) what was in use when it was most, by kind:
            gradients that are there, and everything that does not stay.
    """

    parts: dict[str, int]
    kept: int
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
    """Run the module's own step and its optimiser, in Lightning's order, and watch.

    The gradients of a step live until the next step's forward pass is over, when Lightning removes them.

    Args:
        module: in training; its parameters get gradients.
        batch: on the module's device.
        forward_context: of the trainer's precision.
        on_gpu: let the optimiser update all parameters at once, torch's default on GPUs; it needs memory for that.
        validates: measure a validation step of the same batch, too.
        accumulates: of several batches to a step, one after the first: gradients are there in its backward pass.
    """
    live = LiveBytes()
    with silent_trainer(module), live:
        parameters = list(module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        live.claim(TRAINED, trained)
        live.claim(FROZEN, [tensor for tensor in (*parameters, *module.buffers()) if not tensor.requires_grad])
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda owner: live.claim(GRADIENTS, [] if owner.grad is None else [owner.grad])
            )
        peaks: dict[str, Counter[str]] = {}
        live.restart()
        with forward_context():
            loss = cast(torch.Tensor, module.training_step(batch, 0))
        peaks[FORWARD], kept = live.peak, live.now[OTHER]
        live.restart()
        loss.backward()
        peaks[BACKWARD] = live.peak
        del loss
        optimizer = cast(Any, module.configure_optimizers())["optimizer"]
        if on_gpu:
            for group in optimizer.param_groups:
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
        with live.making(STATES):
            optimizer.step()
        live.restart()
        optimizer.step()
        peaks["optimiser step"] = live.peak
        if validates:
            module.eval()
            live.restart()
            with torch.no_grad(), forward_context():
                cast(Any, module).validation_step(batch, 0)
            peaks["validation"] = live.peak
            module.train()
        parts = {kind: live.now[kind] for kind in (FROZEN, TRAINED, GRADIENTS, STATES)}
    for stage in (FORWARD, BACKWARD) if accumulates else (FORWARD,):
        peaks[stage][GRADIENTS] = parts[GRADIENTS]
    for peak in peaks.values():
        for kind in (FROZEN, TRAINED, STATES):
            del peak[kind]
    return StepMemory(parts, kept, peaks)


@contextmanager
def silent_trainer(module: LightningModule) -> Iterator[None]:
    """A trainer that the module can ask for its step and its ranks, and that logs nothing."""
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    previous = messages.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*barebones.*")
        messages.setLevel(logging.ERROR)  # of a trainer that nobody sees
        try:
            module.trainer = Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=-1, max_steps=1)
            yield
        finally:
            messages.setLevel(previous)
