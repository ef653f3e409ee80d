"""How points are called: in tables, in lines that are printed, and as folders."""

from __future__ import annotations

import re

from ptp_lightning.sweeps.study import Parameters, short_name

LONGEST_RUN_NAME = 120


def describe(parameters: Parameters, seed: int) -> str:
    """A point for people: `loss=kl rank=8 seed=0`."""
    return f"{describe_parameters(parameters)} seed={seed}"


def describe_parameters(parameters: Parameters) -> str:
    """The same without the seed."""
    return " ".join(f"{short_name(name)}={shown(value)}" for name, value in parameters.items())


def run_name(number: int, parameters: Parameters, seed: int) -> str:
    """The folder of a trial, which TensorBoard lists it by."""
    readable = re.sub(r"[^\w.=+-]+", "_", describe(parameters, seed))
    return f"{number:04d}_{readable}"[:LONGEST_RUN_NAME]


def shown(value: object) -> str:
    """A parameter's value."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
