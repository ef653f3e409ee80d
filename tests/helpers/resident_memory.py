r"""The resident memory of real training steps of a configuration.

    MALLOC_MMAP_THRESHOLD_=32768 MALLOC_TRIM_THRESHOLD_=0 \
        python -m tests.helpers.resident_memory --config configs/gated_lora.yaml

The variables let the C library return freed tensors to the system; otherwise it keeps up to as much again.
"""

from __future__ import annotations

import sys

import torch
from lightning import Callback, LightningModule, Trainer

from ptp_lightning.evaluation.memory import PeakMemory
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed

NUM_STEPS = 3


class MeasureMemory(Callback):
    """Measures the bytes of the weights, and the growth of resident memory during training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = sum(tensor.nbytes for tensor in (*pl_module.parameters(), *pl_module.buffers()))
        self._memory = PeakMemory(torch.device("cpu"))
        self._memory.__enter__()
        self._before = self._memory.peak_bytes

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._memory.__exit__(None, None, None)
        self.growth = self._memory.peak_bytes - self._before


def main() -> None:
    """Train some steps, and print the bytes."""
    torch.set_num_threads(1)
    cli = parsed(TrainingCLI, PlainErrorParser, sys.argv[1:], run=False, save_config_callback=None)
    measure = MeasureMemory()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=NUM_STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[measure],
    )
    trainer.fit(cli.model, cli.datamodule)
    print(measure.weights + measure.growth)


if __name__ == "__main__":
    main()
