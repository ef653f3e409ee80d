"""Figures of validations by position; they use no pyplot and need no display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ptp_lightning.metrics import WindowSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")
MAX_LINES = 8
MAX_TICKS = 9
MAX_SINGLE_TICKS = 20  # a tick for each count up to this window length
PALEST = 0.25  # of the colour map, whose lower end is white
PANELS = {
    "accuracy": "accuracy",
    "accuracy_given_prefix": "accuracy given a correct prefix",
    "perplexity": "perplexity",
    "divergence": "divergence from the teacher [nats]",
}


class ValidationCurves(NamedTuple):
    """A validation by position; NaN where there are no data, an empty list where no position has any.

    Attributes:
        step: optimiser step.
        accuracy: `[L]`.
        accuracy_given_prefix: `[L]`.
        perplexity: `[L]`.
        divergence: `[L]`, Kullback-Leibler divergence from the teacher in nats.
    """

    step: int
    accuracy: list[float]
    accuracy_given_prefix: list[float]
    perplexity: list[float]
    divergence: list[float]

    @classmethod
    def of(cls, step: int, summary: WindowSummary, divergences: Mapping[int, float]) -> ValidationCurves:
        """The curves of a summary, and divergences by position."""
        length = summary.prefix_counts.numel() - 1
        curves = [
            # torchmetrics turns results with one element into scalars.
            summary.accuracy.reshape(-1).tolist(),
            summary.accuracy_given_prefix.reshape(-1).tolist(),
            summary.perplexity.reshape(-1).tolist(),
            [divergences.get(position, math.nan) for position in range(length)],
        ]
        return cls(step, *([] if all(map(math.isnan, curve)) else curve for curve in curves))


def draw_by_position(history: Sequence[ValidationCurves]) -> Figure:
    """A panel for each metric that has data, with a line for each validation, from pale to dark."""
    import matplotlib
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import MaxNLocator

    names = [name for name in PANELS if any(getattr(curves, name) for curves in history)]
    shown = evenly_spaced(history, MAX_LINES)
    colours = matplotlib.colormaps["Blues"]
    num_rows = math.ceil(len(names) / 2)
    figure = Figure(figsize=(10, 3.5 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 2, squeeze=False).flatten()
    for name, axes in zip(names, panels, strict=False):
        for rank, curves in enumerate(shown):
            values = getattr(curves, name)
            age = (rank + 1) / len(shown)
            colour = colours(PALEST + (1 - PALEST) * age)
            axes.plot(range(len(values)), values, marker=".", color=colour, label=f"step {curves.step}")
        axes.set(xlabel="position in the window", ylabel=PANELS[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if name.startswith("accuracy"):
            axes.set_ylim(0, 1.02)
        elif name == "perplexity":
            axes.set_yscale("log")
    panels[0].legend(fontsize="small")
    for axes in panels[len(names) :]:
        axes.remove()
    return figure


def draw_accuracy_by_step(history: Sequence[ValidationCurves]) -> Figure:
    """Heat map of accuracy: a column for each position, a row for each validation, the first at the bottom."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        [curves.accuracy for curves in history], origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis"
    )
    axes.set(xlabel="position in the window", ylabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows = evenly_spaced(range(len(history)), MAX_TICKS)
    axes.set_yticks(rows, [str(history[row].step) for row in rows])
    figure.colorbar(image, label="accuracy")
    return figure


def draw_correct_token_counts(summary: WindowSummary) -> Figure:
    """Bar chart: the fraction of windows with a correct prefix of 0, 1, .. L tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    shares = (summary.prefix_counts.double() / summary.num_windows).cpu()
    axes.bar(range(len(shares)), shares.numpy(), color="tab:blue")
    mean = float(summary.correct_tokens)
    axes.axvline(mean, color="tab:orange", label=f"mean {mean:.2f}")
    axes.set(xlabel="correct tokens of a window", ylabel="fraction of windows", ylim=(0, 1))
    if len(shares) <= MAX_SINGLE_TICKS + 1:
        axes.set_xticks(range(len(shares)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def evenly_spaced(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` of the items, the first and the last among them.

    >>> evenly_spaced(range(101), 3)
    [0, 50, 100]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(rank * (len(items) - 1) / (limit - 1))] for rank in range(limit)]
