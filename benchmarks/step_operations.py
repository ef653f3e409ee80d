"""Operations of a training step of a configuration, and the hours of its training on a GPU. Computed, nothing is timed.

    python -m benchmarks.step_operations --config configs/vicuna.yaml --backbone 7b [--tflops 989] [--utilisation 0.3]

The step runs on fake tensors as in `plan`, and takes its options, while torch counts the operations of matrix products
and attention: those of the context, of the windows that the teacher samples, of the slots, and of the backward pass,
which computes no gradients of frozen weights. Multiplications and additions count as one each. The optimizer is left
out. Hours are those of `trainer.max_steps` steps without validation, at a fraction of the dense 16-bit rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ptp_lightning.planning.command import PlanCLI, PlanParser, full_batch
from ptp_lightning.planning.fake_tensors import fake_execution
from ptp_lightning.planning.step_memory import silent_trainer
from ptp_lightning.training.cli import parsed

aten = torch.ops.aten
COUNTED = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
}
"""Functions that count, also of operations that torch's table leaves out."""

TERA = 1e12
SECONDS_PER_HOUR = 3600


class OperationCounter(TorchDispatchMode):
    """Counts multiplications and additions; torch's own counter cannot be used beside `torch.autograd.grad`.

    Attributes:
        total: until now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        result = func(*args, **(kwargs or {}))
        count = COUNTED.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def main() -> None:
    """Count the operations of a step, and print them with the hours for each rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, nargs="+", default=[989.0], help="dense 16-bit rate of a device")
    parser.add_argument("--utilisation", type=float, default=0.3, help="fraction of the rate that a step reaches")
    options, rest = parser.parse_known_args()
    operations, steps = step_operations(rest)
    print(f"{operations / TERA:,.1f} T operations per step, {operations * steps:.2g} in {steps:,} steps")
    for tflops in options.tflops:
        hours = operations * steps / (tflops * TERA * options.utilisation) / SECONDS_PER_HOUR
        print(f"{hours:,.1f} device hours at {options.utilisation:.0%} of {tflops:,.0f} TFLOP/s")


def step_operations(args: Sequence[str]) -> tuple[int, int]:
    """Operations of a training step of one device, and the number of steps.

    Args:
        args: of `plan`: a configuration, `--backbone`, and further keys.
    """
    cli = parsed(PlanCLI, PlanParser, list(args), run=False, save_config_callback=None)
    module: Any = cli.model
    module.end_of_text = None
    with fake_execution(module, on_gpu=True), silent_trainer(module):
        batch = full_batch(cli.datamodule)
        with OperationCounter() as counter, torch.autocast("cpu", torch.bfloat16):
            loss = cast(torch.Tensor, module.training_step(batch, 0))
            loss.backward()
    return counter.total, cli.config["trainer"]["max_steps"]


if __name__ == "__main__":
    main()
