"""OverviewTensorBoardLogger: the curves to look at first come first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

OVERVIEW = {
    "val/correct_tokens": "Overview/correct_tokens",
    "train/loss_nats": "Overview/training_loss_nats",
    "val/nll_nats": "Overview/validation_nll_nats",
    "val/loss_nats": "Overview/validation_loss_nats",
}
"""Further tags of metrics. TensorBoard sorts groups and charts by name, upper case first."""

LAST = {"epoch": "z_schedule/epoch", "train/learning_rate": "z_schedule/learning_rate"}
"""Tags of what is known before the training, which people look at last."""

MONITORED_RATES = "lr-"
"""How the tags of Lightning's `LearningRateMonitor` begin; they come last, too."""


class OverviewTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, with a first group *Overview* of the headline metrics.

    Epochs, which training streams do not have, and learning rates are the last group.

    All other metrics keep their tags; names in checkpoints, monitors and other loggers are the same.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `TensorBoardLogger.log_metrics`."""
        super().log_metrics(with_overview(metrics), step)


def with_overview(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics by the tags under which they are written.

    >>> with_overview({"epoch": 0, "val/correct_tokens": 2.5})
    {'z_schedule/epoch': 0, 'val/correct_tokens': 2.5, 'Overview/correct_tokens': 2.5}
    >>> with_overview({"lr-AdamW": 0.1})
    {'z_schedule/lr-AdamW': 0.1}
    """
    last = LAST | {tag: f"z_schedule/{tag}" for tag in metrics if tag.startswith(MONITORED_RATES)}
    tags = {last.get(tag, tag): value for tag, value in metrics.items()}
    return tags | {OVERVIEW[tag]: value for tag, value in metrics.items() if tag in OVERVIEW}
