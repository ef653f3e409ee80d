"""Budget: how long the trials of a study train."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

STEPS_KEY = "trainer.max_steps"
"""The key of the configuration that is a parameter of every point if a study has several budgets."""


@dataclass(frozen=True)
class Budget:
    """Cost of the trials of a study; results are compared at equal budgets only.

    Args:
        steps: optimiser steps of every trial. A list makes the number of steps a parameter of every point.
        tokens: tokens of all training windows: steps x rows x windows x window length. Those of the largest number of
            steps, if there are several.
        validations: number of validations, evenly spread, the last one after the last step; 1 with several numbers of
            steps.

    >>> budget = Budget(steps=[200, 800], tokens=1600, validations=1)
    >>> budget.largest, budget.tokens_of(200)
    (800, 400)
    """

    steps: int | list[int]
    tokens: int
    validations: int = 4

    def __post_init__(self) -> None:
        if not self.all_steps or len(set(self.all_steps)) < len(self.all_steps):
            raise ValueError(f"expected different numbers in budget.steps, at least one, found {self.steps}")
        if self.all_steps[0] < 1 or self.validations < 1 or self.largest % self.validations:
            raise ValueError(
                f"expected budget.steps to be a multiple of budget.validations, so that the last step is validated, "
                f"found {self.steps} and {self.validations}"
            )
        if not self.is_axis:
            return
        if self.validations != 1:
            raise ValueError(
                f"expected budget.validations 1 with several budget.steps, found {self.validations}: trainings of "
                "different lengths share their first steps, so each is validated at its end alone"
            )
        if self.tokens % self.largest:
            raise ValueError(
                f"expected budget.tokens to be a multiple of the largest of budget.steps, to which they belong, found "
                f"{self.tokens} and {self.largest}"
            )

    @property
    def is_axis(self) -> bool:
        """Whether the number of steps is a parameter of the study."""
        return isinstance(self.steps, list)

    @property
    def all_steps(self) -> list[int]:
        """The numbers of steps, ascending."""
        return sorted(self.steps) if isinstance(self.steps, list) else [self.steps]

    @property
    def largest(self) -> int:
        """The largest number of steps."""
        return self.all_steps[-1]

    def tokens_of(self, steps: int) -> int:
        """Tokens of a training of this number of steps, which need not be one of the budget's."""
        return self.tokens * steps // self.largest

    def definition(self) -> dict[str, Any]:
        """What must not change when a study is continued: with several numbers of steps, others may be added."""
        if not self.is_axis:
            return asdict(self)
        return {"tokens_per_step": self.tokens // self.largest, "validations": self.validations}
