"""The part of a report that compares several budgets: a table by number of steps, and where curves cross."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from ptp_lightning.sweeps.budget import STEPS_KEY
from ptp_lightning.sweeps.crossings import Crossing, Curve, Difference, crossings_of, curves_of
from ptp_lightning.sweeps.names import describe_parameters, format_value
from ptp_lightning.sweeps.study import Study, short_name
from ptp_lightning.sweeps.summary import Row, half_width
from ptp_lightning.sweeps.tables import NONE, markdown, number


def budget_parts(study: Study, rows: Sequence[Row]) -> list[str]:
    """Paragraphs on the results by number of steps."""
    curves = curves_of(rows)
    parts = [steps_table(study, curves), crossings_text(study, curves)]
    if missing := missing_text(study, curves):
        parts.append(missing)
    return parts


def steps_table(study: Study, curves: Sequence[Curve]) -> str:
    """Markdown table with a row for each curve and a column for each number of steps."""
    all_steps = sorted({steps for curve in curves for steps in curve.all_steps})
    names = [name for name in study.distributions if name != STEPS_KEY]
    lines = [[*(short_name(name) for name in names), *(f"{steps:,} steps" for steps in all_steps)]]
    for curve in curves:
        values = [curve.values(steps) if steps in curve.all_steps else [] for steps in all_steps]
        lines.append([*(format_value(curve.parameters[name]) for name in names), *map(mean_text, values)])
    return markdown(lines)


def mean_text(values: Sequence[float]) -> str:
    """The mean and its interval.

    >>> mean_text([1.0, 2.0, 3.0]), mean_text([1.0]), mean_text([])
    ('2.00 ± 2.48', '1.00', '-')
    """
    if not values:
        return NONE
    width = half_width(values)
    return f"{fmean(values):.2f}" + ("" if math.isnan(width) else f" ± {width:.2f}")


def crossings_text(study: Study, curves: Sequence[Curve]) -> str:
    """A sentence for each crossing of two curves."""
    crossings = crossings_of(curves, larger_is_better=study.objective.direction == "maximize")
    if not crossings:
        return "No two curves cross at these numbers of steps.\n"
    num_clear = sum(crossing.is_beyond_noise for crossing in crossings)
    lines = [
        f"Crossings: {len(crossings)}, of which {num_clear} beyond noise: the 95 % interval of the difference, paired "
        "by seed, excludes zero on both sides; not corrected for the number of pairs.\n",
        *(f"* {crossing_text(crossing)}" for crossing in sorted(crossings, key=lambda one: not one.is_beyond_noise)),
    ]
    return "\n".join(lines) + "\n"


def crossing_text(crossing: Crossing) -> str:
    """One crossing as a sentence."""
    leader, follower = (describe_parameters(curve.parameters) for curve in (crossing.leader, crossing.follower))
    if crossing.is_beyond_noise:
        judged = "beyond noise"
    elif any(math.isnan(one.half_width) for one in (crossing.before, crossing.after)):
        judged = "with too few seeds to judge"
    else:
        judged = "within noise"
    return (
        f"{leader} leads {follower} by {_lead(crossing.before)} and trails it by {_lead(crossing.after)} steps; they "
        f"cross near {float(f'{crossing.steps:.2g}'):,.0f}, {judged}."
    )


def missing_text(study: Study, curves: Sequence[Curve]) -> str:
    """Where results of seeds are missing; empty if there are all."""
    parts = []
    for steps in study.budget.all_steps:
        done = {describe_parameters(curve.parameters): len(curve.trials.get(steps, {})) for curve in curves}
        wanted = Counter(
            describe_parameters({name: value for name, value in point.parameters.items() if name != STEPS_KEY})
            for point in study.points()
            if study.steps_of(point.parameters) == steps
        )
        counts = [(name, done.get(name, 0), count) for name, count in wanted.items()]
        missing = [f"{name} ({found} of {count})" for name, found, count in counts if found < count]
        if not any(done.values()):
            parts.append(f"{steps:,} steps: all")
        elif missing:
            parts.append(f"{steps:,} steps: {', '.join(missing)}")
    return f"Results of seeds are missing. {'; '.join(parts)}.\n" if parts else ""


def _lead(difference: Difference) -> str:
    width = "" if math.isnan(difference.half_width) else f" ± {number(difference.half_width, 2)}"
    return f"{number(abs(difference.mean), 2)}{width} at {difference.steps:,}"
