"""Figures of an evaluation: correct tokens of drafts, speed, and the acceptance gap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ptp_lightning.evaluation.acceptance_gap import AcceptanceGap
from ptp_lightning.evaluation.decoders import budget_name
from ptp_lightning.evaluation.records import Record
from ptp_lightning.evaluation.summary import OVERALL, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCEPTANCE, SPEED, GAP = "acceptance.png", "speed.png", "gap.png"


def save_figures(
    records: Iterable[Record],
    scores: Sequence[Score],
    gaps: Sequence[AcceptanceGap],
    budgets: Sequence[int],
    folder: Path,
) -> list[str]:
    """Write the figures; returns the names of those for which there are data."""
    figures = {
        ACCEPTANCE: _acceptance(list(records)),
        SPEED: _speed([score for score in scores if score.category == OVERALL], sorted(budgets)),
        GAP: _gap(gaps),
    }
    names = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            names.append(name)
    return names


def _figure(num_panels: int) -> Figure:
    # Not pyplot, which keeps references to figures and selects a GUI backend.
    from matplotlib.figure import Figure

    return Figure(figsize=(6.0 * num_panels, 4.0), layout="constrained")


def _acceptance(records: list[Record]) -> Figure | None:
    """Histogram of the correct tokens of drafts."""
    drafts: dict[str, Counter[int]] = {}
    for record in records:
        if record.drafted_per_cycle:
            drafts.setdefault(record.decoder, Counter()).update(record.correct_per_cycle)
    if not drafts:
        return None
    figure = _figure(1)
    axes = figure.subplots()
    longest = max(max(counts) for counts in drafts.values())
    width = 0.8 / len(drafts)
    for number, (name, counts) in enumerate(sorted(drafts.items())):
        fractions = [counts[length] / counts.total() for length in range(1, longest + 1)]
        axes.bar(np.arange(1, longest + 1) + (number - (len(drafts) - 1) / 2) * width, fractions, width, label=name)
    axes.set(xlabel="correct tokens of a draft (the first is exact)", ylabel="fraction of drafts")
    axes.legend()
    return figure


def _speed(scores: Sequence[Score], budgets: Sequence[int]) -> Figure:
    """Tokens per call against cost per call (above the diagonal is faster), and speed by slot budget."""
    several = len(budgets) > 1
    figure = _figure(1 + several)
    axes = figure.subplots(1, 2)[0] if several else figure.subplots()
    limit = 1.1 * max(max(score.call_cost, score.tokens_per_call) for score in scores)
    axes.plot([0, limit], [0, limit], color="grey", linestyle="--", label="break-even")
    for score in scores:
        axes.plot(score.call_cost, score.tokens_per_call, "o")
        axes.annotate(
            f"{score.decoder}, T {score.temperature:g}: {score.speed.value:.2f}x",
            (score.call_cost, score.tokens_per_call),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize=7,
        )
    axes.set(
        xlabel="time of a call, in steps of the autoregressive decoder",
        ylabel="tokens per call",
        xlim=(0, limit),
        ylim=(0, limit),
    )
    axes.legend(loc="lower right")
    if several:
        by_budget = figure.axes[1]
        for temperature in sorted({score.temperature for score in scores}):
            speed = {score.decoder: score.speed for score in scores if score.temperature == temperature}
            speeds = [speed[budget_name(budget)] for budget in budgets]
            errors = [[one.value - one.low for one in speeds], [one.high - one.value for one in speeds]]
            values = [one.value for one in speeds]
            by_budget.errorbar(budgets, values, errors, marker="o", capsize=3, label=f"temperature {temperature:g}")
        by_budget.axhline(1.0, color="grey", linestyle="--")
        by_budget.set(xlabel="slots per call", ylabel="speed relative to autoregressive decoding")
        by_budget.set_ylim(bottom=0)
        by_budget.legend()
    return figure


def _gap(gaps: Sequence[AcceptanceGap]) -> Figure | None:
    if not gaps:
        return None
    figure = _figure(len(gaps))
    for axes, gap in zip(np.atleast_1d(figure.subplots(1, len(gaps))), gaps, strict=True):
        curves = {
            "validation": gap.validation,
            "all positions of these texts": gap.all_positions,
            "positions of drafts": gap.draft_positions,
        }
        for number, (name, curve) in enumerate(curves.items()):
            if curve is not None:
                axes.plot(np.arange(1, len(curve) + 1), curve, marker="o", color=f"C{number}", label=name)
        axes.set(
            xlabel="tokens of a draft",
            ylabel="probability that all are correct",
            title=f"temperature {gap.temperature:g}",
            ylim=(0, 1.02),
            xticks=range(1, len(gap.all_positions) + 1),
        )
        axes.legend()
    return figure
