"""Results against the number of steps: a curve for each choice of the other parameters, and where two curves cross."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from optuna.trial import FrozenTrial

from ptp_lightning.sweeps.attributes import CPU_SECONDS, SEED
from ptp_lightning.sweeps.budget import STEPS_KEY
from ptp_lightning.sweeps.study import Parameters
from ptp_lightning.sweeps.summary import Row, half_width, value_of

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Curve:
    """Results of one choice of all parameters but the number of steps.

    Attributes:
        parameters: the choice.
        trials: with a result, by number of steps and seed.
    """

    parameters: Parameters
    trials: dict[int, dict[int, FrozenTrial]] = field(default_factory=dict)

    @property
    def all_steps(self) -> list[int]:
        """The numbers of steps with results, ascending."""
        return sorted(steps for steps, by_seed in self.trials.items() if by_seed)

    def values(self, steps: int) -> list[float]:
        """Results after a number of steps, one for each seed."""
        return [value_of(trial) for trial in self.trials[steps].values()]

    def cpu_hours(self, steps: int) -> float:
        """Mean CPU time of a training, with the steps that it took over from a shorter one."""
        return fmean(trial.user_attrs[CPU_SECONDS] for trial in self.trials[steps].values()) / SECONDS_PER_HOUR


@dataclass(frozen=True)
class Difference:
    """By how much one curve is above another one after the same steps, in trainings of the same seeds.

    Attributes:
        steps: number of steps.
        mean: over seeds.
        half_width: half of the 95 % interval of the mean; NaN for one seed.
    """

    steps: int
    mean: float
    half_width: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.mean) > self.half_width

    def __neg__(self) -> Difference:
        """The difference as the other curve has it."""
        return Difference(self.steps, -self.mean, self.half_width)


@dataclass(frozen=True)
class Crossing:
    """Where two curves cross.

    Attributes:
        leader: the curve that is better before.
        follower: the curve that is better after.
        before: lead of the leader before.
        after: lead of the leader after, a negative one.
        steps: number of steps at which the lead is zero if it is linear in the logarithm of the steps.
    """

    leader: Curve
    follower: Curve
    before: Difference
    after: Difference
    steps: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether both intervals exclude zero."""
        return self.before.is_clear and self.after.is_clear


def curves_of(rows: Sequence[Row]) -> list[Curve]:
    """The curves of a study with several budgets, in the order of its rows."""
    curves: dict[str, Curve] = {}
    for row in rows:
        parameters = {name: value for name, value in row.parameters.items() if name != STEPS_KEY}
        curve = curves.setdefault(json.dumps(parameters, sort_keys=True), Curve(parameters))
        steps = row.parameters[STEPS_KEY]
        assert isinstance(steps, int)
        curve.trials[steps] = {trial.user_attrs[SEED]: trial for trial in row.trials}
    return list(curves.values())


def crossings_of(curves: Sequence[Curve], *, larger_is_better: bool) -> list[Crossing]:
    """All crossings of any two curves."""
    found = []
    for first, second in itertools.combinations(curves, 2):
        differences = differences_of(first, second) if larger_is_better else differences_of(second, first)
        ordered = [one for one in differences if one.mean != 0]
        for k, (before, after) in enumerate(itertools.pairwise(ordered), start=1):
            if before.mean * after.mean < 0:
                found.append(_crossing(first, second, ordered[:k], ordered[k:]))
    return found


def differences_of(first: Curve, second: Curve) -> list[Difference]:
    """The differences after each number of steps that both curves have results for, paired by seed."""
    differences = []
    for steps in sorted(set(first.all_steps) & set(second.all_steps)):
        seeds = sorted(first.trials[steps].keys() & second.trials[steps].keys())
        of_seeds = [value_of(first.trials[steps][seed]) - value_of(second.trials[steps][seed]) for seed in seeds]
        if of_seeds:
            differences.append(Difference(steps, fmean(of_seeds), half_width(of_seeds)))
    return differences


def _crossing(first: Curve, second: Curve, earlier: list[Difference], later: list[Difference]) -> Crossing:
    """The crossing between two lists of leads of the first curve, shown by the nearest clear lead on either side."""
    last, following = earlier[-1], later[0]
    share = last.mean / (last.mean - following.mean)
    steps = last.steps * (following.steps / last.steps) ** share
    before = next((one for one in reversed(earlier) if one.is_clear and one.mean * last.mean > 0), last)
    after = next((one for one in later if one.is_clear and one.mean * following.mean > 0), following)
    if last.mean > 0:
        return Crossing(first, second, before, after, steps)
    return Crossing(second, first, -before, -after, steps)
