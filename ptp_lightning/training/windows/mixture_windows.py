"""MixtureWindows: one of several sources in each training step, with weights that move during training."""

import math
from dataclasses import dataclass

import torch

from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.windows.windows import WindowSample, WindowSource


@dataclass(frozen=True)
class MixtureWindows(WindowSource):
    """Chooses a source for every training step at random, so that a step costs what one source costs.

    The weights are `start` until the share `begin` of the training steps is done, `end` from the share `until` on, and
    linear in between; equal shares make a sudden change. The choice is drawn from a generator of the step, hence
    the same on every run, and on all ranks: sources differ in how often they run the base model, which ranks may share.
    Accumulated batches choose for themselves. Outside training a mixture is as at its end.

    Args:
        sources: what is mixed.
        start: weights of the sources at first, not negative; they need not add up to 1.
        end: weights at last; by default `start`.
        begin: share of the training steps, 0 .. 1.
        until: share of the training steps, `begin` .. 1.

    Raises:
        ValueError: lengths disagree, or a value is out of range.
    """

    sources: list[WindowSource]
    start: list[float]
    end: list[float] | None = None
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        for name, weights in (("start", self.start), ("end", self.end)):
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
        if not 0 <= self.begin <= self.until <= 1:
            raise ValueError(
                "expected 0 <= source.init_args.begin <= source.init_args.until <= 1, found "
                f"{self.begin} and {self.until}"
            )

    def weights(self, progress: float) -> list[float]:
        """The probability of every source once the share `progress` of the training steps is done."""
        if progress < self.begin:
            moved = 0.0
        elif progress >= self.until:
            moved = 1.0
        else:
            moved = (progress - self.begin) / (self.until - self.begin)
        start, end = ([weight / sum(ends) for weight in ends] for ends in (self.start, self.end or self.start))
        return [first + moved * (last - first) for first, last in zip(start, end, strict=True)]

    def choose(self, progress: float, generator: torch.Generator) -> WindowSource:
        """See `WindowSource.choose`; mixtures may hold mixtures."""
        weights = torch.tensor(self.weights(progress), dtype=torch.float64, device=generator.device)
        index = int(torch.multinomial(weights, 1, generator=generator))
        return self.sources[index].choose(progress, generator)

    @property
    def reads_rows(self) -> bool:
        """Whether any source does."""
        return any(source.reads_rows for source in self.sources)

    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        return self.choose(1.0, generator).sample(predictor, context, generator)
