"""RunText: the command of a run and its results, as text."""

from __future__ import annotations

import shlex
import sys

from lightning.pytorch import Callback, LightningModule, Trainer

from ptp_lightning.metrics import WindowSummary, as_tags
from ptp_lightning.training.callbacks.trainer_state import tensorboard_loggers, val_summary
from ptp_lightning.utils.passwords import without_passwords

COMMAND_TAG = "run/command"
RESULTS_TAG = "run/results"


class RunText(Callback):
    """TensorBoard's text tab: the command of the run, and a table of its last validation at the end."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the command."""
        command = without_passwords(shlex.join(["python", *sys.orig_argv[1:]]))
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_text(COMMAND_TAG, f"```\n{command}\n```", global_step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        summary = val_summary(trainer, pl_module)
        if summary is None or summary.num_windows == 0:
            return
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_text(RESULTS_TAG, markdown_table(summary), global_step=trainer.global_step)


def markdown_table(summary: WindowSummary) -> str:
    """Correct tokens, and a row for each position; "-" where there are no data."""
    tags = as_tags(summary)
    names = ("accuracy", "accuracy_given_prefix", "perplexity")
    rows = ["| position | accuracy | given a correct prefix | perplexity |", "|---:|---:|---:|---:|"]
    for position in range(summary.prefix_counts.numel() - 1):
        values = [tags.get(f"val/{name}/position_{position:02d}") for name in names]
        rows.append(f"| {position} | {' | '.join('-' if value is None else f'{value:.3f}' for value in values)} |")
    headline = f"**{float(summary.correct_tokens):.3f}** correct tokens per call in {int(summary.num_windows)} windows"
    return "\n".join([headline, "", *rows])
