"""Study: the typed content of a YAML file in sweeps/. Optuna's classes are named by `class_path`."""

from __future__ import annotations

import itertools
import json
import os
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler

from ptp_lightning.sweeps.budget import STEPS_KEY, Budget
from ptp_lightning.utils.named_files import shipped_names
from ptp_lightning.utils.renamed_keys import require_current_names
from ptp_lightning.utils.user_errors import plain_reason

QUICK = "quick"  # key of what the quick version changes, and suffix of its name
ENTRY_BY_ENTRY = ("overrides", "variants", "settings")
MAX_GRID = 1000

Value = bool | int | float | str | None
Parameters = dict[str, Value]
Overrides = dict[str, Any]


@dataclass(frozen=True)
class StudyObjective:
    """The metric that a study compares.

    Args:
        metric: tag of a validation metric; `{name}` in it stands for the value of the parameter whose path ends in it.
        direction: whether larger or smaller values are better.
    """

    metric: str = "val/correct_tokens"
    direction: Literal["maximize", "minimize"] = "maximize"


@dataclass(frozen=True)
class Preparation:
    """A training that trials depend on, of a teacher for instance; it runs if its output is missing.

    Args:
        output: the folder that the training writes.
        config: configuration of the training, relative to the study's file.
        overrides: of this configuration; they must make it write to `output`.
        forwarded_keys: keys whose overrides in the study apply to this training too.
    """

    output: str
    config: str
    overrides: Overrides = field(default_factory=dict)
    forwarded_keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PublishedValue:
    """A published result.

    Args:
        point: the parameters of the measurement, by their names in the study.
        value: the result.
    """

    point: dict[str, Value]
    value: float


@dataclass(frozen=True)
class Published:
    """Published results, for a column of the table.

    Args:
        source: reference and meaning of the numbers.
        values: the numbers.
    """

    source: str
    values: list[PublishedValue]


@dataclass(frozen=True)
class Point:
    """One training of a study.

    Attributes:
        parameters: of a grid's point; empty if a sampler chooses them when the trial starts.
        seed: of weights, data and auxiliaries.
        ticket: number among the points that a sampler chooses; None in a grid.
    """

    parameters: Parameters
    seed: int
    ticket: int | None = None

    @property
    def key(self) -> str:
        """Identity of the point in a storage.

        >>> Point({"rank": 8}, seed=0).key
        '[{"rank": 8}, 0, null]'
        """
        return json.dumps([self.parameters, self.seed, self.ticket], sort_keys=True)


@dataclass(frozen=True)
class Study:
    """A study. Without a sampler it is the grid of all variants and settings, each point trained once per seed.

    With several numbers of steps in its budget, every point of the grid is trained once for each of them.

    Args:
        title: the question, in one line.
        base: configuration of the trials, relative to the study's file.
        budget: of every trial.
        overrides: keys of the configuration and their values, for all trials.
        variants: parameters with named choices; a choice is a set of overrides.
        settings: parameters that are a single key of the configuration, and the distribution of its values.
        seeds: of the trials of a point.
        seed_paths: keys of the configuration that are set to the seed.
        objective: the metric that is compared.
        extra_metrics: further metrics for the table.
        draft_lengths: a second table shows correct tokens if only this many tokens of a window are drafted. Without a
            refiner, slots do not see later slots, so this is the result of a shorter window.
        sampler: chooses the points; by default the whole grid is trained.
        trials: number of points that the sampler chooses.
        pruner: stops trials at a validation; by default none.
        baseline: the point that the figure by position compares with the best one; by default the worst.
        published: published results.
        prepare: trainings that run before the first trial.
    """

    title: str
    base: str
    budget: Budget
    overrides: Overrides = field(default_factory=dict)
    variants: dict[str, dict[str, Overrides]] = field(default_factory=dict)
    settings: dict[str, BaseDistribution] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    seed_paths: list[str] = field(
        default_factory=lambda: ["seed_everything", "model.init_args.seed", "data.init_args.seed"]
    )
    objective: StudyObjective = field(default_factory=StudyObjective)
    extra_metrics: list[str] = field(default_factory=list)
    draft_lengths: list[int] = field(default_factory=list)
    sampler: BaseSampler | None = None
    trials: int | None = None
    pruner: BasePruner = field(default_factory=NopPruner)
    baseline: Parameters | None = None
    published: Published | None = None
    prepare: list[Preparation] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a study without parameters or with contradictions."""
        if not self.variants and not self.settings:
            raise ValueError("expected parameters to compare, found none: set variants or settings")
        for name, choices in self.variants.items():
            if not choices:
                raise ValueError(f"expected choices of variants.{name}, found none")
        if both := sorted(self.variants.keys() & self.settings.keys()):
            raise ValueError(f"expected each parameter once, found {both} in variants and settings")
        if self.budget.is_axis and self.sampler is not None:
            raise ValueError(
                f"expected one number of budget.steps with a sampler, found {self.budget.steps}: leave sampler and "
                "trials out to train the grid at all of them"
            )
        names = [*self.variants, *self.settings, *([STEPS_KEY] if self.budget.is_axis else [])]
        shorts = [short_name(name) for name in names]
        if len(set(shorts)) < len(shorts):
            raise ValueError(f"expected parameters whose paths end differently, found {shorts}: make one a variant")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"expected different seeds, at least one, found seeds: {self.seeds}")
        if (self.sampler is None) != (self.trials is None):
            raise ValueError("expected sampler and trials together: without a sampler the whole grid is trained")
        if self.sampler is not None and len(self.seeds) > 1:
            raise ValueError(
                f"expected a single seed with a sampler, which tries every point once, found seeds: {self.seeds}"
            )
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"expected trials >= 1, found {self.trials}")
        if self.sampler is None:
            for name, distribution in self.settings.items():
                _choices(name, distribution)  # raises if there are infinitely many
        published = [] if self.published is None else [entry.point for entry in self.published.values]
        for named in [self.baseline or {}, *published]:
            self._require_known(named)
        try:
            self.metric_of(self.covering_points()[0])
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"expected objective.metric to name parameters {[short_name(name) for name in self.distributions]} in "
                f"braces, found {self.objective.metric}"
            ) from error

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Distributions of all parameters; a variant has those of its choices' names.

        Several numbers of steps are a range: in a storage it may grow, while choices are fixed.
        """
        if not self.budget.is_axis:
            return self._compared
        steps = self.budget.all_steps
        return self._compared | {STEPS_KEY: IntDistribution(steps[0], steps[-1], log=True)}

    def points(self) -> list[Point]:
        """All trainings: those of few steps first, and among them those of the first seed."""
        if self.trials is not None:
            return [Point({}, self.seeds[0], ticket) for ticket in range(self.trials)]
        budgets = [{STEPS_KEY: steps} for steps in self.budget.all_steps] if self.budget.is_axis else [{}]
        grid = list(self._grid())
        return [Point(parameters | budget, seed) for budget in budgets for seed in self.seeds for parameters in grid]

    def covering_points(self) -> list[Parameters]:
        """The fewest points that contain every choice of every parameter, and the ends of every range."""
        choices = {name: _some_choices(distribution) for name, distribution in self.distributions.items()}
        count = max(len(values) for values in choices.values())
        return [{name: values[k % len(values)] for name, values in choices.items()} for k in range(count)]

    def overrides_of(self, parameters: Mapping[str, Value]) -> Overrides:
        """Overrides of the configuration that parameters stand for, without those of the budget."""
        changed: Overrides = {}
        for name, value in parameters.items():
            if name != STEPS_KEY or not self.budget.is_axis:
                changed |= self.variants[name][str(value)] if name in self.variants else {name: value}
        return changed

    def steps_of(self, parameters: Mapping[str, Value]) -> int:
        """Number of steps of a point's training."""
        return int(parameters[STEPS_KEY] or 0) if self.budget.is_axis else self.budget.largest

    def metric_of(self, parameters: Mapping[str, Value]) -> str:
        """Tag of a point's metric."""
        return self.objective.metric.format(**{short_name(name): value for name, value in parameters.items()})

    @property
    def _compared(self) -> dict[str, BaseDistribution]:
        """Distributions of variants and settings."""
        variants = {name: CategoricalDistribution(list(choices)) for name, choices in self.variants.items()}
        return variants | self.settings

    def _grid(self) -> Iterator[Parameters]:
        choices = {name: _choices(name, distribution) for name, distribution in self._compared.items()}
        for values in itertools.product(*choices.values()):
            yield dict(zip(choices, values, strict=True))

    def _require_known(self, parameters: Mapping[str, Value]) -> None:
        for name, value in parameters.items():
            distribution = self.distributions.get(name)
            if distribution is None:
                raise ValueError(f"expected one of the parameters {sorted(self.distributions)}, found {name!r}")
            if isinstance(distribution, CategoricalDistribution) and value not in distribution.choices:
                raise ValueError(f"expected one of the choices {list(distribution.choices)} of {name}, found {value!r}")


def load_study(path: Path, *, full: bool) -> Study:
    """Read a study's file.

    Args:
        path: the file.
        full: read the full version; otherwise the quick one, in which the keys below `quick` replace those of the full
            version. Of `overrides`, `variants` and `settings` they replace single entries, or remove them (null).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key or a value of it is wrong.
    """
    if not path.is_file():
        shipped = ", ".join(shipped_names("sweeps"))
        raise FileNotFoundError(f"expected a study at {path}, found none: give a file, or one of {shipped}")
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, found {error}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: expected the keys of a study, found {type(plain).__name__}")
    require_current_names(plain, str(path))
    quick = plain.pop(QUICK, None) or {}
    if not isinstance(quick, dict):
        raise ValueError(f"{path}: expected keys of a study below {QUICK}, found {type(quick).__name__}")
    if not full:
        for key, value in quick.items():
            merged = (plain.get(key) or {}) | (value or {}) if key in ENTRY_BY_ENTRY else value
            plain[key] = {k: v for k, v in merged.items() if v is not None} if key in ENTRY_BY_ENTRY else merged
    plain = _with_class_paths_as_text(plain)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study")
    try:
        study: Study = parser.instantiate(parser.parse_object({"study": _without_overrides(plain)}))["study"]
        return replace(study, overrides=plain.get("overrides", {}), variants=plain.get("variants", {}))
    except (ArgumentError, ValueError, TypeError) as error:
        reason = plain_reason(str(error)).replace("study.", "")
        raise ValueError(f"{path}: {reason}") from error


def study_name(path: Path, *, full: bool) -> str:
    """Name of a study in its storage; the quick and the full version are two studies.

    >>> study_name(Path("sweeps/losses.yaml"), full=False)
    'losses_quick'
    """
    return path.stem if full else f"{path.stem}_{QUICK}"


def short_name(parameter: str) -> str:
    """The last part of a key.

    >>> short_name("model.init_args.predictor.lora.rank")
    'rank'
    """
    return parameter.rpartition(".")[2]


def path_from_study(study_file: Path, path: str) -> str:
    """A path relative to a study's file, made relative to the current folder.

    >>> path_from_study(Path("sweeps/losses.yaml"), "../configs/gated_lora.yaml")
    'configs/gated_lora.yaml'
    """
    return os.path.relpath(study_file.parent / path)


def _with_class_paths_as_text(plain: dict[str, Any]) -> dict[str, Any]:
    """A study whose overrides have class paths as text, as options of the command line have them."""
    text = dict(plain)
    if isinstance(plain.get("overrides"), dict):
        text["overrides"] = _class_path_as_text(plain["overrides"])
    if isinstance(plain.get("variants"), dict):
        text["variants"] = {
            name: {str(choice): _class_path_as_text(more or {}) for choice, more in (choices or {}).items()}
            for name, choices in plain["variants"].items()
        }
    return text


def _class_path_as_text(overrides: Overrides) -> Overrides:
    """`a: {class_path: b.C, init_args: {d: 1}}` as `a: b.C` and `a.init_args.d: 1`."""
    text: Overrides = {}
    for path, value in overrides.items():
        if isinstance(value, dict) and "class_path" in value:
            text[path] = value["class_path"]
            text |= _class_path_as_text({f"{path}.init_args.{k}": v for k, v in value.get("init_args", {}).items()})
        else:
            text[path] = value
    return text


def _without_overrides(plain: dict[str, Any]) -> dict[str, Any]:
    """A study for jsonargparse, which would instantiate every entry with `class_path`, also in lists."""
    left = dict(plain)
    if isinstance(plain.get("overrides"), dict):
        left["overrides"] = {}
    if isinstance(plain.get("variants"), dict):
        left["variants"] = {name: {choice: {} for choice in choices} for name, choices in plain["variants"].items()}
    return left


def _choices(name: str, distribution: BaseDistribution) -> list[Value]:
    """All values of a setting of a grid; raises ValueError if there are infinitely many."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution | FloatDistribution) and distribution.step is not None:
        count = int((distribution.high - distribution.low) / distribution.step + 1e-8) + 1
        if count <= MAX_GRID and not distribution.log:
            return [distribution.low + k * distribution.step for k in range(count)]
    raise ValueError(
        f"expected finitely many values of settings.{name}, found {distribution}: name them with a "
        "CategoricalDistribution, give it a step, or set sampler and trials"
    )


def _some_choices(distribution: BaseDistribution) -> list[Value]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return [distribution.low, distribution.high]
