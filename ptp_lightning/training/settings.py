"""Settings of a run that are refused by their keys, before a model is built or a file is written."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging

from ptp_lightning.models.config import PredictorConfig


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


ACCELERATORS: dict[str, Callable[[], bool]] = {
    "gpu": _has_gpu,
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
}
MINIMA = {
    "max_steps": -1,
    "max_epochs": -1,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 0,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
}
"""Smallest values below `trainer`; null is allowed."""
_DEVICES = re.compile(r"auto|-?\d+(,-?\d+)*,?|\[.*\]")
_PROCESSES = re.compile(r"None|auto|[1-9]\d*")  # of a CPU
_FRACTION = re.compile(r"\d*\.\d*[1-9]\d*")
MODEL_CHANGES = ("LearningRateFinder", "BatchSizeFinder", "BackboneFinetuning", "ModelPruning")
EPOCH_AVERAGING = "StochasticWeightAveraging"
_INEXACT = "does not restore averages exactly: leave it out"
NOT_RESUMED: dict[type, str] = {
    StochasticWeightAveraging: _INEXACT,
    WeightAveraging: _INEXACT,
    GradientAccumulationScheduler: "forgets its accumulation: leave it out and set trainer.accumulate_grad_batches",
}
"""Callbacks of trainings that cannot go on from a checkpoint, and what Lightning does."""


def require_trainer_settings(trainer: Mapping[str, Any]) -> None:
    """Refuse what Lightning refuses late, without the name of the key, or not at all.

    Args:
        trainer: the parsed settings below `trainer`.

    Raises:
        ValueError: a value is out of its range, a device is not there, or a callback changes the model or its settings.

    >>> require_trainer_settings({"accelerator": "cpu", "max_steps": -5})
    Traceback (most recent call last):
    ValueError: expected trainer.max_steps >= -1, found -5
    """
    for name, minimum in MINIMA.items():
        value = trainer.get(name)
        if value is not None and not minimum <= value < math.inf:
            raise ValueError(f"expected trainer.{name} >= {minimum}, found {value}")
    interval = trainer.get("val_check_interval")
    if isinstance(interval, (int, float)) and not interval > 0:
        raise ValueError(f"expected trainer.val_check_interval > 0, found {interval}")
    devices = trainer.get("devices")
    if devices in (0, "0", [], "[]") or (isinstance(devices, str) and not _DEVICES.fullmatch(devices)):
        raise ValueError(f"expected trainer.devices auto, a number from one on, or indices, found {devices}")
    accelerator = trainer.get("accelerator")
    runs_on_cpu = accelerator == "cpu" or (accelerator in (None, "auto") and not _has_gpu())
    if runs_on_cpu and not _PROCESSES.fullmatch(str(devices)):
        raise ValueError(
            "expected trainer.devices auto or a number of processes from one on, because a CPU has no indices, found "
            f"{devices}"
        )
    if not ACCELERATORS.get(str(accelerator), lambda: True)():
        raise ValueError(f"expected a trainer.accelerator that this machine has, found {accelerator}: set it to cpu")
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = str(getattr(callback, "class_path", "")).rpartition(".")[2]
        if name in MODEL_CHANGES:
            raise ValueError(
                f"expected trainer.callbacks that observe a run, found {name}, which changes what this package takes "
                "from its configuration: remove it, and compare several runs"
            )
        if name == EPOCH_AVERAGING and not _has_epochs(trainer):
            raise ValueError(
                f"expected trainer.limit_train_batches, the number of batches of an epoch, beside {name} in "
                "trainer.callbacks, which averages the weights at the start of each epoch, found none: set it, because "
                "training streams have no end"
            )


def _has_epochs(trainer: Mapping[str, Any]) -> bool:
    limit = trainer.get("limit_train_batches")
    return isinstance(limit, int) and limit > 0


def require_whole_interval(config: Mapping[str, Any]) -> None:
    """Refuse validations after a part of an epoch, where checkpoints are to be written as often.

    Args:
        config: dotted keys and values of files and options.

    Raises:
        ValueError: `trainer.val_check_interval` is a fraction, and no other period of checkpoints is given.

    >>> require_whole_interval({"trainer.val_check_interval": "0.25"})
    Traceback (most recent call last):
    ValueError: expected a whole number of steps for trainer.val_check_interval, found 0.25: streams have no end
    """
    interval = str(config.get("trainer.val_check_interval", ""))
    if _FRACTION.fullmatch(interval) and float(interval) > 0 and config.get("checkpoint.every_n_train_steps") is None:
        raise ValueError(
            f"expected a whole number of steps for trainer.val_check_interval, found {interval}: streams have no end"
        )


def require_resumable(callbacks: Sequence[object]) -> None:
    """Check that a training with these callbacks can go on from a checkpoint.

    Lightning restores averaged weights wrongly: it ends the training at once, or continues with other weights; those of
    `WeightAveraging` it cannot load, since checkpoints are without the weights of the base model. It forgets what
    `GradientAccumulationScheduler` has set until the next epoch begins.

    Raises:
        ValueError: one of them averages weights, or changes the accumulation.
    """
    for callback in callbacks:
        for kind, reason in NOT_RESUMED.items():
            if isinstance(callback, kind):
                raise ValueError(
                    f"expected trainer.callbacks without {type(callback).__name__} for a training that goes on from a "
                    f"checkpoint, since Lightning {reason}, or train anew without ckpt_path"
                )


def require_sections(config: Mapping[str, Any], place: str) -> None:
    """Refuse `null` where a section has to be.

    Args:
        config: keys and values as they are written, keys dotted or nested.
        place: where they are written, for the error.

    Raises:
        ValueError: a section is null.

    >>> require_sections({"model": {"init_args": {"predictor": {"lora": None}}}}, "a.yaml")
    Traceback (most recent call last):
    ValueError: a.yaml: expected settings of model.init_args.predictor.lora, found null: leave it out for its defaults
    """
    for key, value in leaves(config):
        parts = [part for part in key.split(".") if part != "init_args"]
        owner = parts[-2] if len(parts) > 1 else ""
        if value in (None, "null", "None") and parts[-1] in _sections().get(owner, ()):
            raise ValueError(f"{place}: expected settings of {key}, found null: leave it out for its defaults")


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sections() -> dict[str, frozenset[str]]:
    """Names of sections that are never null, by the section that holds them."""
    from ptp_lightning import data, training

    modules = [getattr(training, name) for name in training.__all__ if name.endswith("Module")]
    data_modules = [getattr(data, name) for name in data.__all__ if name.endswith("DataModule")]
    return {
        "": frozenset({"model", "data", "trainer"}),
        "model": _never_null(*modules),
        "data": _never_null(*data_modules),
        "predictor": _never_null(PredictorConfig),
    }


def _never_null(*classes: type) -> frozenset[str]:
    """Parameters of these classes that are sections and that none of them takes as None."""
    names, optional = set[str](), set[str]()
    for one in classes:
        for name, hint in typing.get_type_hints(one.__init__).items():
            if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
                optional.add(name)
            elif isinstance(hint, type) and hint.__module__.startswith("ptp_lightning."):
                names.add(name)
    return frozenset(names - optional)
