"""ValidatedCheckpoint: a `ModelCheckpoint` whose files hold the validation of their own step."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging


class ValidatedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that writes its newest file again after a validation at the same step.

    Lightning writes what `every_n_train_steps` asks for before that step's validation. A validation may be killed, so
    that this file is needed; but it would hold the results of the validation before, or none, and with it an exported
    adapter's expected numbers of correct tokens.

    `StochasticWeightAveraging` gives the model the averaged weights after the last step, so the newest file is written
    again then, too.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `ModelCheckpoint`; during a training, write the checkpoint of this step again."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write_again(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `ModelCheckpoint`, which is called after all other callbacks."""
        super().on_train_end(trainer, pl_module)
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
            self._write_again(trainer)

    def _write_again(self, trainer: Trainer) -> None:
        """Write the newest file again if it is of this step."""
        # Lightning has no public names for its newest file and that file's step.
        if self._last_checkpoint_saved and self._last_global_step_saved == trainer.global_step:
            trainer.save_checkpoint(self._last_checkpoint_saved, self.save_weights_only)
