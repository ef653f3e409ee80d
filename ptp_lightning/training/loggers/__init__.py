"""Loggers: TensorBoard with what matters most in its first group."""

from ptp_lightning.training.loggers.overview import OverviewTensorBoardLogger

__all__ = ["OverviewTensorBoardLogger"]
