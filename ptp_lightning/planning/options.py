"""The options of `plan`, and its entry, which explains them without importing the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptp_lightning.planning.backbones import BACKBONES
from ptp_lightning.utils.short_help import all_options, configured_help, wants_help

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

DESCRIPTION = "Estimate the memory of a training step of a configuration, before anything is downloaded."


def run(args: Sequence[str]) -> None:
    """Print help, or see `ptp_lightning.planning.command.run`."""
    if wants_help(args):
        print(configured_help("plan", DESCRIPTION, add_plan_options))
        return
    from ptp_lightning.planning.command import run as run_command

    run_command(all_options(args))


def add_plan_options(parser: ArgumentParser) -> None:
    """Add the options that `fit` does not have."""
    add = parser.add_argument
    add("--gpus", type=int | None, default=None, help="number of GPUs; null uses trainer.devices and num_nodes")
    add("--memory", type=str | None, default=None, help="memory of one GPU, for example 80GB: does the step fit?")
    add("--backbone", type=str | None, default=None, help=f"replaces predictor.backbone: {', '.join(BACKBONES)}")
    add("--json", action="store_true", help="print one JSON object, in bytes")
