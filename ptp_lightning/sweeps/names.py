"""Readable names of points, for tables, log lines and folders."""

from __future__ import annotations

import re

from ptp_lightning.sweeps.budget import Budget
from ptp_lightning.sweeps.study import Parameters, short_name

MAX_RUN_NAME = 120


def describe(parameters: Parameters, seed: int) -> str:
    """A point with its seed.

    >>> describe({"loss": "kl", "model.init_args.predictor.lora.rank": 8}, seed=0)
    'loss=kl rank=8 seed=0'
    """
    return f"{describe_parameters(parameters)} seed={seed}"


def describe_parameters(parameters: Parameters) -> str:
    """A point without its seed."""
    return " ".join(f"{short_name(name)}={format_value(value)}" for name, value in parameters.items())


def budget_text(budget: Budget) -> str:
    """The budget in words.

    >>> budget_text(Budget(steps=[200, 800], tokens=819200, validations=1))
    '200 or 800 steps of 1,024 tokens'
    """
    if not budget.is_axis:
        return f"{budget.largest:,} steps and {budget.tokens:,} tokens"
    *others, last = (f"{steps:,}" for steps in budget.all_steps)
    steps = f"{', '.join(others)} or {last}" if others else last
    return f"{steps} steps of {budget.tokens // budget.largest:,} tokens"


def run_name(number: int, parameters: Parameters, seed: int) -> str:
    """The folder of a trial, under which TensorBoard lists it.

    >>> run_name(7, {"loss": "kl"}, seed=0)
    '0007_loss=kl_seed=0'
    """
    readable = re.sub(r"[^\w.=+-]+", "_", describe(parameters, seed))
    return f"{number:04d}_{readable}"[:MAX_RUN_NAME]


def format_value(value: object) -> str:
    """A parameter's value, floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
