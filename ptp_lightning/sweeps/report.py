"""The report of a study: Markdown tables and figures of the trials in a storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import optuna
from optuna.trial import TrialState

from ptp_lightning.sweeps.attributes import COMMAND, GIVEN_UP, TRACEBACK
from ptp_lightning.sweeps.budget_report import budget_parts
from ptp_lightning.sweeps.figures import write_figures
from ptp_lightning.sweeps.names import budget_text, describe_parameters, format_value
from ptp_lightning.sweeps.study import Study, short_name
from ptp_lightning.sweeps.summary import Row, at_largest_budget, best_row, rows_of
from ptp_lightning.sweeps.tables import NONE, markdown, number

REPORT = "report.md"
MIN_RESULTS_FOR_IMPORTANCE = 8


def write_report(study: Study, stored: optuna.Study, folder: Path) -> str:
    """Write report.md and its figures into a folder; returns the text to show.

    Raises:
        ValueError: trials had different budgets.
    """
    rows = rows_of(study, stored)
    folder.mkdir(parents=True, exist_ok=True)
    figures = write_figures(study, stored, rows, folder)
    text = report_text(study, stored, rows)
    pictures = "".join(f"\n![{name.partition('.')[0]}]({name})\n" for name in figures)
    path = folder / REPORT
    path.write_text(text + pictures, encoding="utf-8")
    return f"{text}\nReport  {os.path.relpath(path)}"


def report_text(study: Study, stored: optuna.Study, rows: Sequence[Row]) -> str:
    """The report without its figures."""
    parts = [
        f"# {stored.study_name}\n\n{study.title}\n",
        f"`{study.objective.metric}` ({study.objective.direction}) after {budget_text(study.budget)}; seeds "
        f"{', '.join(map(str, study.seeds))}. `±` is half of the 95 % interval of the mean over seeds (Student's t).\n",
        *(budget_parts(study, rows) if study.budget.is_axis else []),
        table(study, rows),
    ]
    overheads = sorted(seconds for row in rows for seconds in row.overheads)
    if overheads:
        parts.append(
            f"Overhead per trial outside training: median {median(overheads):.1f} s, at most {overheads[-1]:.1f} s.\n"
        )
    if study.draft_lengths:
        parts.append("Correct tokens if only the first tokens of each window are drafted, means over seeds:\n")
        parts.append(shorter_drafts_table(study, rows))
    if study.published is not None:
        parts.append(f"Published: {study.published.source}.\n")
    importances = parameter_importances(study, stored)
    if importances:
        shares = ", ".join(f"{short_name(name)} {share:.2f}" for name, share in importances.items())
        parts.append(f"Importance of the parameters (fANOVA, shares of 1): {shares}.\n")
    best = best_row(study, at_largest_budget(study, rows))
    if best is not None:
        command = best.trials[0].user_attrs.get(COMMAND)  # results of a CSV file have none
        parts.append(f"Best: {describe_parameters(best.parameters)}.{' Its training alone:' if command else ''}\n")
        parts += [f"```\n{command}\n```\n"] if command else []
    parts += failures(stored)
    return "\n".join(parts)


def table(study: Study, rows: Sequence[Row]) -> str:
    """Markdown table with a row for each point."""
    names = list(study.distributions)
    has_published = any(row.published is not None for row in rows)
    header = [*(short_name(name) for name in names), "mean", "±", "trials", "pruned", "failed", "seconds per trial"]
    header += study.extra_metrics
    lines = [header + ["published"] * has_published]
    for row in rows:
        cells = [*(format_value(row.parameters.get(name)) for name in names), number(row.mean), number(row.half_width)]
        cells += [str(len(row.trials)), str(row.num_pruned), str(row.num_failed), number(row.seconds, 1)]
        cells += [number(row.mean_of(tag)) for tag in study.extra_metrics]
        lines.append(cells + [NONE if row.published is None else f"{row.published:g}"] * has_published)
    return markdown(lines)


def shorter_drafts_table(study: Study, rows: Sequence[Row]) -> str:
    """Markdown table with a row for each point and a column for each draft length."""
    names = list(study.distributions)
    lines = [[*(short_name(name) for name in names), *(f"first {length}" for length in study.draft_lengths)]]
    lines += [
        [
            *(format_value(row.parameters.get(name)) for name in names),
            *(number(row.correct_of_first(length)) for length in study.draft_lengths),
        ]
        for row in rows
    ]
    return markdown(lines)


def parameter_importances(study: Study, stored: optuna.Study) -> dict[str, float]:
    """Share of each parameter in the variance of results (fANOVA); empty if it would say nothing.

    Optuna's default evaluator compares the best trials with all trials, which is blind in a grid.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    num_results = len(stored.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if len(study.distributions) < 2 or num_results < MIN_RESULTS_FOR_IMPORTANCE or study.budget.is_axis:
        return {}  # the budget would explain most of the variance
    try:
        evaluator = FanovaImportanceEvaluator(seed=0)
        return get_param_importances(stored, evaluator=evaluator, params=list(study.distributions))
    except (ValueError, RuntimeError):  # for instance, all results are equal
        return {}


def failures(stored: optuna.Study) -> list[str]:
    """The last line of each failed trial's traceback."""
    failed = [
        (trial.number, trial.user_attrs[TRACEBACK].strip().splitlines()[-1])
        for trial in stored.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        if TRACEBACK in trial.user_attrs and GIVEN_UP not in trial.user_attrs
    ]
    if not failed:
        return []
    return [
        "Failed (the whole traceback is a user attribute of the trial):\n",
        *(f"* {n}: {line}" for n, line in failed),
        "",
    ]
