"""StepProgressBar: the progress bar on a terminal."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's progress bar for training streams without epochs, which Lightning labels `Epoch 0/-2`."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"  # as wide as the other label
