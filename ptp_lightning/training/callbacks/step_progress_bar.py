"""StepProgressBar: the progress bar on a terminal."""

from __future__ import annotations

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's progress bar for training streams without epochs, which Lightning labels `Epoch 0/-2`.

    Without a terminal or notebook it stays silent: rich would leave its last frame in the log, whose lines are those
    of `LogProgress`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decide whether the bar is drawn."""
        super().setup(trainer, pl_module, stage)
        console = rich.get_console()
        if not (console.is_terminal or console.is_jupyter):
            self.disable()

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"  # as wide as the other label
