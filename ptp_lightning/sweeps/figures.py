"""Figures of a study: its history, the results by each parameter, and accuracy by position.

With several budgets, curves of the results by steps and by CPU time take the place of the first two.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from ptp_lightning.sweeps.attributes import ACCURACY
from ptp_lightning.sweeps.crossings import Curve, curves_of
from ptp_lightning.sweeps.names import describe_parameters
from ptp_lightning.sweeps.study import Study, short_name
from ptp_lightning.sweeps.summary import (
    Row,
    at_largest_budget,
    baseline_row,
    best_row,
    half_width,
    parameters_of,
    value_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
HISTORY = "history.png"
SLICES = "slices.png"
POSITIONS = "positions.png"
DOTS_PER_INCH = 120


def write_figures(study: Study, stored: optuna.Study, rows: Sequence[Row], folder: Path) -> list[str]:
    """Write the figures that have data; returns their file names."""
    complete = stored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    figures: dict[str, Figure | None] = {}
    if complete and study.budget.is_axis:
        figures = {CURVES: draw_curves(study, curves_of(rows))}
    elif complete:
        figures = {HISTORY: draw_history(study, stored), SLICES: draw_slices(study, complete)}
    figures[POSITIONS] = draw_positions(study, at_largest_budget(study, rows))
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=DOTS_PER_INCH)
    return [name for name, figure in figures.items() if figure is not None]


def draw_curves(study: Study, curves: Sequence[Curve]) -> Figure:
    """Results against the number of steps and against CPU hours; bars are 95 % intervals over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    by_steps, by_hours = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        all_steps = curve.all_steps
        values = [curve.values(steps) for steps in all_steps]
        means, widths = [fmean(one) for one in values], [half_width(one) for one in values]
        for axes, x_values in (by_steps, all_steps), (by_hours, [curve.cpu_hours(steps) for steps in all_steps]):
            axes.errorbar(x_values, means, widths, fmt="o-", capsize=3, label=describe_parameters(curve.parameters))
    all_steps = sorted({steps for curve in curves for steps in curve.all_steps})
    by_steps.set(xscale="log", xlabel="steps", ylabel=study.objective.metric)
    by_steps.set_xticks(all_steps, [f"{steps:,}" for steps in all_steps])
    by_steps.minorticks_off()
    by_hours.set(xscale="log", xlabel="CPU hours of a training")
    by_steps.legend(fontsize="small")
    return figure


def draw_history(study: Study, stored: optuna.Study) -> Figure:
    """Results and pruned trials by trial number, and the best result so far."""
    figure, axes = _figure(7, 3.5)
    complete = stored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pruned = stored.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    numbers, values = [trial.number for trial in complete], [value_of(trial) for trial in complete]
    better = max if study.objective.direction == "maximize" else min
    best = list(itertools.accumulate(values, lambda old, new: better(old, new)))
    axes.plot(numbers, values, "o", color="tab:blue", label="result")
    if pruned:
        of_pruned = [trial.number for trial in pruned], [value_of(trial) for trial in pruned]
        axes.plot(*of_pruned, "x", color="tab:gray", label="pruned")
    axes.step(numbers, best, where="post", color="tab:orange", label="best so far")
    axes.set(xlabel="trial", ylabel=study.objective.metric)
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    return figure


def draw_slices(study: Study, complete: Sequence[FrozenTrial]) -> Figure:
    """One panel for each parameter: all results over its values."""
    names = list(study.distributions)
    figure, panels = _panels(len(names))
    for name, axes in zip(names, panels, strict=True):
        distribution = study.distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            labels = [str(choice) for choice in distribution.choices]
            x_values: list[Any] = [labels.index(str(parameters_of(trial)[name])) for trial in complete]
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
            axes.set_xlim(-0.5, len(labels) - 0.5)
        else:
            x_values = [parameters_of(trial)[name] for trial in complete]
            assert isinstance(distribution, IntDistribution | FloatDistribution)
            if distribution.log:
                axes.set_xscale("log")
        axes.plot(x_values, [value_of(trial) for trial in complete], "o", alpha=0.6, color="tab:blue")
        axes.set(xlabel=short_name(name))
    panels[0].set(ylabel=study.objective.metric)
    return figure


def draw_positions(study: Study, rows: Sequence[Row]) -> Figure | None:
    """Accuracy by position of the best point against the baseline, means over seeds; None without both."""
    shown = {"best": best_row(study, rows), "baseline": baseline_row(study, rows)}
    curves = {label: (row, _accuracy(row)) for label, row in shown.items() if row is not None}
    curves = {label: (row, curve) for label, (row, curve) in curves.items() if curve is not None}
    if len(curves) < 2 or shown["best"] == shown["baseline"]:
        return None
    figure, axes = _figure(7, 3.5)
    for (label, (row, curve)), colour in zip(curves.items(), ("tab:blue", "tab:gray"), strict=True):
        axes.plot(range(len(curve)), curve, "o-", color=colour, label=f"{label}: {describe_parameters(row.parameters)}")
    axes.set(xlabel="position in the window", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend()
    return figure


def _accuracy(row: Row) -> np.ndarray | None:
    curves = [trial.user_attrs[ACCURACY] for trial in row.trials if trial.user_attrs.get(ACCURACY)]
    return np.mean(np.array(curves, dtype=float), axis=0) if curves else None


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # a figure without pyplot needs no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4 * count, 5), 3.5), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
