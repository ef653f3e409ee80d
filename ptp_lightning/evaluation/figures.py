"""Pictures of an evaluation: how long drafts are right, what speed that buys, and what is lost before decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ptp_lightning.evaluation.contenders import name_of_budget
from ptp_lightning.evaluation.records import Record
from ptp_lightning.evaluation.summary import OVERALL, Gap, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCEPTANCE, SPEED, GAP = "acceptance.png", "speed.png", "gap.png"


def draw(
    records: Iterable[Record], scores: Sequence[Score], gaps: Sequence[Gap], budgets: Sequence[int], folder: Path
) -> list[str]:
    """Write the pictures; returns the names of those that there is something to see in."""
    drawn = {
        ACCEPTANCE: _acceptance(list(records)),
        SPEED: _speed([score for score in scores if score.category == OVERALL], sorted(budgets)),
        GAP: _gap(gaps),
    }
    names = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            names.append(name)
    return names


def _figure(num_panels: int) -> Figure:
    # Not pyplot, which keeps figures and picks a window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(6.0 * num_panels, 4.0), layout="constrained")


def _acceptance(records: list[Record]) -> Figure | None:
    """How many drafts had 1, 2, .. tokens right."""
    drafts: dict[str, Counter[int]] = {}
    for record in records:
        if record.drafted_per_cycle:
            drafts.setdefault(record.contender, Counter()).update(record.correct_per_cycle)
    if not drafts:
        return None
    figure = _figure(1)
    axes = figure.subplots()
    longest = max(max(counts) for counts in drafts.values())
    width = 0.8 / len(drafts)
    for number, (name, counts) in enumerate(sorted(drafts.items())):
        shares = [counts[length] / counts.total() for length in range(1, longest + 1)]
        axes.bar(np.arange(1, longest + 1) + (number - (len(drafts) - 1) / 2) * width, shares, width, label=name)
    axes.set(xlabel="correct tokens of a draft (the first is exact)", ylabel="share of drafts")
    axes.legend()
    return figure


def _speed(scores: Sequence[Score], budgets: Sequence[int]) -> Figure:
    """Tokens a call against what a call costs: above the diagonal is faster than one token a call; and by slots."""
    several = len(budgets) > 1
    figure = _figure(1 + several)
    axes = figure.subplots(1, 2)[0] if several else figure.subplots()
    most = 1.1 * max(max(score.call_cost, score.tokens_per_call) for score in scores)
    axes.plot([0, most], [0, most], color="grey", linestyle="--", label="break-even")
    for score in scores:
        axes.plot(score.call_cost, score.tokens_per_call, "o")
        axes.annotate(
            f"{score.contender}, T {score.temperature:g}: {score.speed.value:.2f}x",
            (score.call_cost, score.tokens_per_call),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize=7,
        )
    axes.set(
        xlabel="time of a call, in steps of the autoregressive decoder",
        ylabel="tokens per call",
        xlim=(0, most),
        ylim=(0, most),
    )
    axes.legend(loc="lower right")
    if several:
        by_budget = figure.axes[1]
        for temperature in sorted({score.temperature for score in scores}):
            speed = {score.contender: score.speed for score in scores if score.temperature == temperature}
            mine = [speed[name_of_budget(budget)] for budget in budgets]
            errors = [[one.value - one.low for one in mine], [one.high - one.value for one in mine]]
            values = [one.value for one in mine]
            by_budget.errorbar(budgets, values, errors, marker="o", capsize=3, label=f"temperature {temperature:g}")
        by_budget.axhline(1.0, color="grey", linestyle="--")
        by_budget.set(xlabel="slots of a call", ylabel="speed over one token a call")
        by_budget.set_ylim(bottom=0)
        by_budget.legend()
    return figure


def _gap(gaps: Sequence[Gap]) -> Figure | None:
    if not gaps:
        return None
    figure = _figure(len(gaps))
    for axes, gap in zip(np.atleast_1d(figure.subplots(1, len(gaps))), gaps, strict=True):
        curves = {
            "validation": gap.validation,
            "every place of these texts": gap.everywhere,
            "where drafts were made": gap.landed,
        }
        for number, (name, curve) in enumerate(curves.items()):
            if curve is not None:
                axes.plot(np.arange(1, len(curve) + 1), curve, marker="o", color=f"C{number}", label=name)
        axes.set(
            xlabel="tokens of a draft",
            ylabel="probability that all are right",
            title=f"temperature {gap.temperature:g}",
            ylim=(0, 1.02),
            xticks=range(1, len(gap.everywhere) + 1),
        )
        axes.legend()
    return figure
