"""PositionCharts: figures by position at every validation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ptp_lightning.metrics import as_tags
from ptp_lightning.training.callbacks.figures import (
    ValidationCurves,
    draw_accuracy_by_step,
    draw_by_position,
    draw_correct_token_counts,
)
from ptp_lightning.training.trainer_state import tensorboard_loggers, val_summary

LINES_TAG = "val/by_position"
HEAT_MAP_TAG = "val/accuracy_by_step"
COUNTS_TAG = "val/correct_token_counts"
DIVERGENCE_TAG = re.compile(r"val/kl/position_(\d+)")


class PositionCharts(Callback):
    """TensorBoard: figures of accuracy, perplexity and divergence by position, and of correct tokens.

    They show all validations up to the present one; checkpoints store the earlier ones. A complete validation before
    the first step (`trainer.num_sanity_val_steps: -1`) is logged as step 0, including its scalars, which Lightning
    discards.
    """

    def __init__(self) -> None:
        self._history: list[ValidationCurves] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures; the module has set its `val_summary`."""
        summary = val_summary(trainer, pl_module)
        if summary is None or summary.num_windows == 0:
            return
        step = trainer.global_step
        curves = ValidationCurves.of(step, summary, _divergences(trainer.callback_metrics))
        self._history = [*(earlier for earlier in self._history if earlier.step < step), curves]
        for logger in tensorboard_loggers(trainer):
            if trainer.sanity_checking:
                logger.log_metrics(as_tags(summary), step=0)
            figures = {LINES_TAG: draw_by_position(self._history), COUNTS_TAG: draw_correct_token_counts(summary)}
            if len(self._history) > 1:
                figures[HEAT_MAP_TAG] = draw_accuracy_by_step(self._history)
            for tag, figure in figures.items():
                logger.experiment.add_figure(tag, figure, global_step=step)

    def state_dict(self) -> dict[str, Any]:
        """The earlier validations, as plain data."""
        return {"history": [curves._asdict() for curves in self._history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the checkpoint."""
        self._history = [ValidationCurves(**curves) for curves in state_dict["history"]]


def _divergences(metrics: Mapping[str, Any]) -> dict[int, float]:
    """Divergences from the teacher by position; empty for modules without any."""
    found = ((DIVERGENCE_TAG.fullmatch(tag), value) for tag, value in metrics.items())
    return {int(match[1]): float(value) for match, value in found if match is not None}
