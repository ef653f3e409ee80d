"""Results of a study as a small CSV file, and back: reports can be written again without storage and training."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from ptp_lightning.sweeps.attributes import (
    ACCURACY,
    CPU_SECONDS,
    GIVEN_UP,
    METRICS,
    PREFIX_COUNTS,
    SECONDS,
    SEED,
    STEPS,
    TOKENS,
    TRAINING_SECONDS,
    VERSION,
)
from ptp_lightning.sweeps.budget import STEPS_KEY
from ptp_lightning.sweeps.study import Parameters, Point, Study, Value
from ptp_lightning.sweeps.summary import parameters_of
from ptp_lightning.utils.atomic_files import write_atomically

STATE, VALUE, DATE = "state", "value", "date"
COUNTS = (STEPS, TOKENS)
TIMES = (SECONDS, TRAINING_SECONDS, CPU_SECONDS)


def write_csv(study: Study, stored: optuna.Study, path: Path) -> None:
    """Write a row for each trial that ended: its parameters, results, time, date and version.

    Lists (accuracy by position; number of windows with 0, 1, .. correct tokens) are separated by spaces.
    """
    order = {point.key: k for k, point in enumerate(study.points())}

    def sort_key(trial: FrozenTrial) -> tuple[int, int]:
        key = Point(parameters_of(trial), trial.user_attrs[SEED]).key
        return order.get(key, len(order)), trial.number

    ended = [trial for trial in stored.get_trials(deepcopy=False) if trial.state.is_finished()]
    ended = sorted((trial for trial in ended if GIVEN_UP not in trial.user_attrs), key=sort_key)
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(study), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(study, trial) for trial in ended)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def read_csv(study: Study, path: Path, name: str) -> optuna.Study:
    """A study in memory with the results in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a value does not belong to this study.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected results at --from_csv {path}, found none: write them with report --csv")
    stored = optuna.create_study(study_name=name, direction=study.objective.direction)
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if missing := [column for column in _columns(study) if column not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}: expected the columns of the study {name}, found none named {missing}")
        for line, row in enumerate(rows, start=2):
            try:
                stored.add_trial(_trial(study, row))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}: expected a result of {name} in line {line}: {error}") from error
    return stored


def _columns(study: Study) -> list[str]:
    lists = (ACCURACY, PREFIX_COUNTS)
    return [*_named(study), SEED, STATE, *COUNTS, VALUE, *study.extra_metrics, *TIMES, DATE, VERSION, *lists]


def _named(study: Study) -> dict[str, BaseDistribution]:
    """The parameters with a column of their own; the number of steps has one in every file."""
    return {name: one for name, one in study.distributions.items() if name != STEPS_KEY or not study.budget.is_axis}


def _row(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    parameters, attributes = parameters_of(trial), trial.user_attrs
    row: dict[str, Any] = {name: str(parameters[name]) for name in _named(study)}
    row |= {SEED: attributes[SEED], STATE: trial.state.name.lower(), VERSION: attributes.get(VERSION)}
    row |= {STEPS: attributes.get(STEPS, study.steps_of(parameters)), TOKENS: attributes.get(TOKENS)}
    row |= {VALUE: trial.value} | {tag: attributes.get(METRICS, {}).get(tag) for tag in study.extra_metrics}
    row |= {name: f"{attributes[name]:.2f}" for name in TIMES if name in attributes}
    row[DATE] = None if trial.datetime_complete is None else trial.datetime_complete.isoformat(timespec="seconds")
    row[ACCURACY] = " ".join(f"{value:.5g}" for value in attributes.get(ACCURACY) or ())
    row[PREFIX_COUNTS] = " ".join(map(str, attributes.get(PREFIX_COUNTS) or ()))
    return row


def _trial(study: Study, row: Mapping[str, str]) -> FrozenTrial:
    state = TrialState[row[STATE].upper()]
    parameters: Parameters = {name: _value(name, one, row[name]) for name, one in _named(study).items()}
    if study.budget.is_axis:
        parameters[STEPS_KEY] = int(row[STEPS])
    attributes: dict[str, Any] = {SEED: int(row[SEED]), VERSION: row[VERSION] or None}
    attributes |= {name: int(row[name]) for name in COUNTS if row[name]}
    attributes |= {name: float(row[name]) for name in TIMES if row[name]}
    attributes[METRICS] = {tag: float(row[tag]) for tag in study.extra_metrics if row[tag]}
    attributes[ACCURACY] = [float(value) for value in row[ACCURACY].split()]
    attributes[PREFIX_COUNTS] = [int(count) for count in row[PREFIX_COUNTS].split()]
    trial = create_trial(
        state=state,
        value=float(row[VALUE]) if row[VALUE] else None,
        params=parameters,
        distributions=_distributions(study, parameters),
        user_attrs=attributes,
    )
    if row[DATE]:
        trial.datetime_complete = datetime.fromisoformat(row[DATE])
    return trial


def _value(name: str, distribution: BaseDistribution, text: str) -> Value:
    """A parameter's value from its text.

    Raises:
        ValueError: it is none of the choices, or no number.
    """
    match distribution:
        case CategoricalDistribution():
            choices = {str(choice): choice for choice in distribution.choices}
            if text not in choices:
                raise ValueError(f"expected one of the choices {list(choices)} of {name}, found {text!r}")
            return choices[text]
        case IntDistribution():
            return int(text)
        case _:
            return float(text)


def _distributions(study: Study, parameters: Parameters) -> dict[str, BaseDistribution]:
    """Distributions of the parameters; that of the steps also has the numbers of earlier versions of the study."""
    distributions = study.distributions
    if study.budget.is_axis:
        steps = [*study.budget.all_steps, study.steps_of(parameters)]
        distributions[STEPS_KEY] = IntDistribution(min(steps), max(steps), log=True)
    return distributions
