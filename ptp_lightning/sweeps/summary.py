"""Results of a study by point: means over seeds with confidence intervals, at equal budgets only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import optuna
from optuna.trial import FrozenTrial, TrialState

from ptp_lightning.sweeps.attributes import GIVEN_UP, METRICS, PREFIX_COUNTS, SECONDS, STEPS, TOKENS, TRAINING_SECONDS
from ptp_lightning.sweeps.study import Parameters, Study
from ptp_lightning.utils.renamed_keys import current_key

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """Results of one point.

    Attributes:
        parameters: of the point.
        trials: with a result, one per seed.
        num_pruned: number of trials that the pruner stopped.
        num_failed: number of trials with an error.
        published: the published result, if there is one.
    """

    parameters: Parameters
    trials: tuple[FrozenTrial, ...]
    num_pruned: int
    num_failed: int
    published: float | None

    @property
    def mean(self) -> float:
        """Mean result; NaN without results."""
        return fmean(value_of(trial) for trial in self.trials) if self.trials else math.nan

    @property
    def half_width(self) -> float:
        """Half width of the 95 % confidence interval of the mean (Student's t over seeds); NaN below two results."""
        return half_width([value_of(trial) for trial in self.trials])

    @property
    def seconds(self) -> float:
        """Mean seconds per trial; NaN without results."""
        return fmean(trial.user_attrs[SECONDS] for trial in self.trials) if self.trials else math.nan

    @property
    def overheads(self) -> list[float]:
        """Seconds of each trial outside its training: configuration, model and data."""
        return [trial.user_attrs[SECONDS] - trial.user_attrs[TRAINING_SECONDS] for trial in self.trials]

    def mean_of(self, tag: str) -> float:
        """Mean of another metric of the last validation; NaN if it was not logged."""
        values = [trial.user_attrs[METRICS].get(tag, math.nan) for trial in self.trials]
        return fmean(values) if values else math.nan

    def correct_of_first(self, length: int) -> float:
        """Mean correct tokens if only the first `length` tokens of a window are drafted; NaN for shorter windows."""
        counts = [trial.user_attrs[PREFIX_COUNTS] for trial in self.trials]
        if not counts or len(counts[0]) <= length:
            return math.nan
        return fmean(
            sum(min(correct, length) * windows for correct, windows in enumerate(one)) / sum(one) for one in counts
        )


def half_width(values: Sequence[float]) -> float:
    """Half width of the 95 % confidence interval of a mean of independent normal values; NaN below two.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))


def rows_of(study: Study, stored: optuna.Study) -> list[Row]:
    """A row for each point with a finished trial: a grid's in its order, a sampler's sorted from the best on.

    Raises:
        ValueError: trials had different budgets.
    """
    ended: dict[str, list[FrozenTrial]] = {}
    if study.sampler is None:
        ended = {_key(point.parameters): [] for point in study.points()}
    for trial in stored.get_trials(deepcopy=False):
        if trial.state.is_finished() and GIVEN_UP not in trial.user_attrs:
            ended.setdefault(_key(parameters_of(trial)), []).append(trial)
    require_equal_budgets(study, [trial for trials in ended.values() for trial in trials])
    rows = [_row(study, trials) for trials in ended.values() if trials]
    if study.sampler is not None:
        sign = -1 if study.objective.direction == "maximize" else 1
        rows.sort(key=lambda row: math.inf if math.isnan(row.mean) else sign * row.mean)
    return rows


def require_equal_budgets(study: Study, trials: Sequence[FrozenTrial]) -> None:
    """Refuse results of unequal budgets.

    Raises:
        ValueError: a trial trained on other numbers of steps or tokens.
    """
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            steps = study.steps_of(parameters_of(trial))
            tokens = study.budget.tokens_of(steps)
            spent = trial.user_attrs.get(STEPS), trial.user_attrs.get(TOKENS)
            if spent != (steps, tokens):
                raise ValueError(
                    f"expected {steps} steps and {tokens} tokens of every trial (budget), found "
                    f"{spent[0]} and {spent[1]} of trial {trial.number}: only equal budgets are compared; set budget, "
                    "or remove the trial from the storage"
                )


def at_largest_budget(study: Study, rows: Sequence[Row]) -> list[Row]:
    """The rows of the largest number of steps with results; all rows if there is one budget."""
    largest = max((study.steps_of(row.parameters) for row in rows if row.trials), default=0)
    return [row for row in rows if study.steps_of(row.parameters) == largest]


def best_row(study: Study, rows: Sequence[Row]) -> Row | None:
    """The row with the best mean; None without results."""
    return _extreme(rows, largest=study.objective.direction == "maximize")


def baseline_row(study: Study, rows: Sequence[Row]) -> Row | None:
    """The row of the study's baseline, or the one with the worst mean; None without results."""
    if study.baseline is None:
        return _extreme(rows, largest=study.objective.direction != "maximize")
    matching = [row for row in rows if row.trials and study.baseline.items() <= row.parameters.items()]
    return matching[0] if matching else None


def _extreme(rows: Sequence[Row], *, largest: bool) -> Row | None:
    with_results = [row for row in rows if row.trials]
    if not with_results:
        return None
    return max(with_results, key=lambda row: row.mean if largest else -row.mean)


def _row(study: Study, trials: Sequence[FrozenTrial]) -> Row:
    states = [trial.state for trial in trials]
    parameters = {name: parameters_of(trials[0])[name] for name in study.distributions}
    published = (
        [entry.value for entry in study.published.values if entry.point == parameters] if study.published else []
    )
    return Row(
        parameters=parameters,
        trials=tuple(trial for trial in trials if trial.state == TrialState.COMPLETE),
        num_pruned=states.count(TrialState.PRUNED),
        num_failed=states.count(TrialState.FAIL),
        published=published[0] if published else None,
    )


def parameters_of(trial: FrozenTrial) -> Parameters:
    """Parameters of a trial of any version, by the names of today."""
    return {current_key(name): value for name, value in trial.params.items()}


def _key(parameters: Parameters) -> str:
    return json.dumps(parameters, sort_keys=True)


def value_of(trial: FrozenTrial) -> float:
    """Result of a trial; of a pruned trial its last validation."""
    assert trial.value is not None
    return trial.value
