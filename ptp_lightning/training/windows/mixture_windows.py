"""MixtureWindows: each training step uses one of several sources, with weights that change during training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource


@dataclass(frozen=True)
class MixtureWindows(WindowSource):
    """Draws one source for every training step, so that a step costs as much as with that source alone.

    The weights are `initial_weights` until the fraction `schedule_start` of the training steps, `final_weights` from
    the fraction `schedule_end` on, and linear in between; equal fractions give a sudden change. The choice is drawn
    from a generator of the step: it is the same in every run and on all ranks, because sources differ in how often they
    call the base model, whose weights the ranks may share. Each micro-batch of an accumulated step draws its own
    choice. Outside training the final weights apply.

    Args:
        sources: the sources to choose from.
        initial_weights: not negative; they need not sum to 1.
        final_weights: by default `initial_weights`.
        schedule_start: fraction of the training steps, 0 .. 1.
        schedule_end: fraction of the training steps, `schedule_start` .. 1.

    Raises:
        ValueError: lengths disagree, or a value is out of range.

    >>> from ptp_lightning.training import StudentWindows, TeacherWindows
    >>> mixture = MixtureWindows([TeacherWindows(), StudentWindows()], initial_weights=[1, 0], final_weights=[0, 1])
    >>> mixture.weights(progress=0.25)
    [0.75, 0.25]
    """

    sources: list[WindowSource]
    initial_weights: list[float]
    final_weights: list[float] | None = None
    schedule_start: float = 0.0
    schedule_end: float = 1.0

    def __post_init__(self) -> None:
        for name, weights in (("initial_weights", self.initial_weights), ("final_weights", self.final_weights)):
            if weights is None:
                continue
            if len(weights) != len(self.sources):
                raise ValueError(
                    f"expected one weight a source in source.init_args.{name}, found {len(weights)} for "
                    f"{len(self.sources)} sources"
                )
            if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
                raise ValueError(
                    f"expected finite weights >= 0, not all 0, in source.init_args.{name}, found {weights}"
                )
        if not 0 <= self.schedule_start <= self.schedule_end <= 1:
            raise ValueError(
                "expected 0 <= source.init_args.schedule_start <= source.init_args.schedule_end <= 1, found "
                f"{self.schedule_start} and {self.schedule_end}"
            )

    def weights(self, progress: float) -> list[float]:
        """The probability of every source when the fraction `progress` of the training steps is done."""
        if progress < self.schedule_start:
            moved = 0.0
        elif progress >= self.schedule_end:
            moved = 1.0
        else:
            moved = (progress - self.schedule_start) / (self.schedule_end - self.schedule_start)
        ends = (self.initial_weights, self.final_weights or self.initial_weights)
        start, end = ([weight / sum(weights) for weight in weights] for weights in ends)
        return [first + moved * (last - first) for first, last in zip(start, end, strict=True)]

    def choose(self, progress: float, generator: torch.Generator) -> WindowSource:
        """See `WindowSource.choose`; mixtures may be nested."""
        weights = torch.tensor(self.weights(progress), dtype=torch.float64, device=generator.device)
        index = int(torch.multinomial(weights, 1, generator=generator))
        return self.sources[index].choose(progress, generator)

    @property
    def depends_on_progress(self) -> bool:
        """Whether the weights change."""
        changes = self.final_weights is not None and self.weights(0.0) != self.weights(1.0)
        return changes or any(source.depends_on_progress for source in self.sources)

    @property
    def reads_rows(self) -> bool:
        """Whether any source does."""
        return any(source.reads_rows for source in self.sources)

    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        return self.choose(1.0, generator).sample(predictor, context, generator)
