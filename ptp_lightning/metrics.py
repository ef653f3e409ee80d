"""Metrics over windows: the correct prefix, and accuracy and perplexity at every position.

All states are sums and counts, so that batches, validation loops and ranks add up exactly.
Tensor sizes: L window length; `...` any batch shape (rows, windows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class WindowSummary(NamedTuple):
    """The result of `WindowMetrics`; position 0 is the first token of the window.

    Means are NaN where their count is 0.

    Attributes:
        correct_tokens: scalar float64, mean length of the correct prefix (0 .. L), the first token counted: the number
            of tokens that one fused verify-and-draft call commits.
        standard_error: scalar float64, of `correct_tokens`, as if windows were independent; a lower bound, because
            windows of one document are correlated. NaN below two windows.
        num_windows: scalar int64, windows with at least one valid position.
        prefix_counts: [L + 1] int64, how many windows have a correct prefix of 0, 1, .. L tokens.
        accuracy: [L] float64, fraction of windows whose draft has the reference token at this position.
        num_positions: [L] int64, windows that reach this position.
        accuracy_given_prefix: [L] float64, the same among windows that are correct at all earlier positions.
        num_given_prefix: [L] int64, those windows.
        perplexity: [L] float64, exp of the mean negative log-likelihood of the reference token.
        num_likelihoods: [L] int64, windows with a likelihood at this position.
    """

    correct_tokens: Tensor
    standard_error: Tensor
    num_windows: Tensor
    prefix_counts: Tensor
    accuracy: Tensor
    num_positions: Tensor
    accuracy_given_prefix: Tensor
    num_given_prefix: Tensor
    perplexity: Tensor
    num_likelihoods: Tensor


class _SumMetric(Metric):
    """A metric whose sums keep their dtype when the module around it is cast, as `precision: bf16-true` does."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Move to another device, but do not change the dtype."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)


class WindowMetrics(_SumMetric):
    """Agreement of drafted windows with their reference tokens: correct prefix, accuracy and perplexity by position.

    Args:
        window_length: L, the tokens of a window.

    Raises:
        ValueError: if `window_length` is not positive.

    Two windows of three tokens, the second of which ends after two:

    >>> metrics = WindowMetrics(window_length=3)
    >>> correct = torch.tensor([[True, True, False], [True, False, False]])
    >>> mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> metrics.update(correct, mask)
    >>> summary = metrics.compute()
    >>> summary.correct_tokens, summary.accuracy
    (tensor(1.5000, dtype=torch.float64), tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    prefix_counts: Tensor
    num_correct: Tensor
    num_positions: Tensor
    num_given_prefix: Tensor
    nats: Tensor
    num_likelihoods: Tensor

    def __init__(self, window_length: int) -> None:
        super().__init__()
        if window_length < 1:
            raise ValueError(f"Expected a window of at least one token, found `window_length: {window_length}`.")
        self.window_length = window_length
        self.add_state("prefix_counts", torch.zeros(window_length + 1, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("num_correct", "num_positions", "num_given_prefix", "num_likelihoods"):
            self.add_state(name, torch.zeros(window_length, dtype=torch.int64), dist_reduce_fx="sum")
        # Sums of millions of terms lose precision in float32.
        self.add_state("nats", torch.zeros(window_length, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self, correct: Tensor, mask: Tensor, nll: Tensor | None = None, has_likelihood: Tensor | None = None
    ) -> None:
        """Add windows.

        Args:
            correct: [..., L] bool, whether the draft equals the reference token.
            mask: [..., L] bool, valid positions: a prefix of each window, possibly empty. The rest is not read.
            nll: [..., L] float, `-log P_student` of the reference token in nats; None does not update the perplexity.
            has_likelihood: [..., L] bool, tokens that the student can predict; the perplexity is that of these tokens.
                None for all.

        Raises:
            ValueError: if a shape is not [..., L], or if a mask has a hole.
        """
        shapes = [list(tensor.shape) for tensor in (correct, mask, nll, has_likelihood) if tensor is not None]
        if any(shape != shapes[0] or shape[-1:] != [self.window_length] for shape in shapes):
            raise ValueError(
                f"Expected equal sizes [..., {self.window_length}] of correct, mask, nll and has_likelihood, found "
                f"{shapes}; the last one is `window_length`."
            )
        correct = correct.reshape(-1, self.window_length).bool()
        mask = mask.reshape(-1, self.window_length).bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(
                "Expected the valid positions of every window to be a prefix of it, found a mask with a hole."
            )

        correct = correct & mask
        prefix = correct.cumprod(-1)  # 1 up to the first error
        prefix_before = torch.nn.functional.pad(prefix[:, :-1], (1, 0), value=1).bool()
        self.prefix_counts += torch.bincount(prefix.sum(-1)[mask[:, 0]], minlength=self.window_length + 1)
        self.num_correct += correct.sum(0)
        self.num_positions += mask.sum(0)
        self.num_given_prefix += (mask & prefix_before).sum(0)
        if nll is not None:
            nll = nll.reshape(-1, self.window_length).double()
            counted = mask if has_likelihood is None else mask & has_likelihood.reshape(-1, self.window_length)
            self.nats += torch.where(counted, nll, 0.0).sum(0)
            self.num_likelihoods += counted.sum(0)

    def compute(self) -> WindowSummary:
        """The means over everything added since the last reset, over all ranks."""
        lengths = torch.arange(self.window_length + 1, device=self.prefix_counts.device)
        num_windows = self.prefix_counts.sum()
        total = (self.prefix_counts * lengths).sum()
        total_squares = (self.prefix_counts * lengths**2).sum()
        # Sum of squared deviations times n, in integers: no cancellation.
        deviations = num_windows * total_squares - total**2
        # Number of correct prefixes that include position j, for every j.
        num_prefix_correct = self.prefix_counts.flip(0).cumsum(0).flip(0)[1:]
        return WindowSummary(
            correct_tokens=total.double() / num_windows,
            standard_error=(deviations.double() / (num_windows - 1).clamp(min=0)).sqrt() / num_windows,
            num_windows=num_windows,
            prefix_counts=self.prefix_counts,
            accuracy=self.num_correct.double() / self.num_positions,
            num_positions=self.num_positions,
            accuracy_given_prefix=num_prefix_correct.double() / self.num_given_prefix,
            num_given_prefix=self.num_given_prefix,
            perplexity=(self.nats / self.num_likelihoods).exp(),
            num_likelihoods=self.num_likelihoods,
        )


class PositionMeans(_SumMetric):
    """Means of a quantity at each of the positions 0 .. P - 1.

    Args:
        num_positions: P; later positions are ignored.

    >>> means = PositionMeans(num_positions=3)
    >>> means.update(values=torch.tensor([1.0, 3.0, 5.0]), positions=torch.tensor([0, 0, 2]))
    >>> means.compute()
    {0: 2.0, 2: 5.0}
    """

    is_differentiable = False
    full_state_update = False

    totals: Tensor
    counts: Tensor

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.add_state("totals", torch.zeros(num_positions, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_positions, dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, values: Tensor, positions: Tensor) -> None:
        """Add values `[...]`, each at its position `[...]`, int64 >= 0."""
        kept = positions < self.num_positions
        positions = positions[kept]
        self.totals.index_add_(0, positions, values[kept].double())
        self.counts += torch.bincount(positions, minlength=self.num_positions)

    def compute(self) -> dict[int, float]:
        """Mean by position, over all ranks; positions without a value are left out."""
        counts = self.counts.reshape(-1).tolist()
        data = enumerate(zip(self.totals.reshape(-1).tolist(), counts, strict=True))
        return {position: total / count for position, (total, count) in data if count > 0}


class WeightedMean(_SumMetric):
    """The sum of totals over the sum of their counts, in float64; NaN without a count.

    >>> mean = WeightedMean()
    >>> mean.update(torch.tensor(6.0), torch.tensor(3.0))
    >>> mean.update(torch.tensor(1.0), torch.tensor(1.0))
    >>> float(mean.compute())
    1.75
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, total: Tensor, count: Tensor) -> None:
        """Add a total and its count, scalars."""
        self.total += total.double()
        self.count += count.double()

    def compute(self) -> Tensor:
        """The mean over all ranks, scalar float64."""
        return self.total / self.count


def as_tags(summary: WindowSummary, prefix: str = "val") -> dict[str, float]:
    """The scalars of a summary under their logged names; scalars without data are left out.

    Args:
        summary: the result of `WindowMetrics.compute`.
        prefix: the stage: "train", "val" or "test".

    Returns:
        `{prefix}/correct_tokens`, `{prefix}/correct_tokens_standard_error`, `{prefix}/nll_nats` (the mean negative
        log-likelihood of reference tokens, without the first one of each window), and for every position with data
        `{prefix}/accuracy/position_03`, `{prefix}/accuracy_given_prefix/position_03`,
        `{prefix}/perplexity/position_03`.
    """
    tags: dict[str, float] = {}
    if summary.num_windows > 0:
        tags[f"{prefix}/correct_tokens"] = float(summary.correct_tokens)
    if summary.num_windows > 1:
        tags[f"{prefix}/correct_tokens_standard_error"] = float(summary.standard_error)
    counts = summary.num_likelihoods.reshape(-1)[1:]
    if counts.sum() > 0:
        nats = summary.perplexity.reshape(-1)[1:].log() * counts
        tags[f"{prefix}/nll_nats"] = float(nats[counts > 0].sum() / counts.sum())
    by_position = {
        "accuracy": (summary.accuracy, summary.num_positions),
        "accuracy_given_prefix": (summary.accuracy_given_prefix, summary.num_given_prefix),
        "perplexity": (summary.perplexity, summary.num_likelihoods),
    }
    for name, (values, counts) in by_position.items():
        # torchmetrics turns results with one element into scalars, so those of one-token windows.
        data = zip(values.reshape(-1).tolist(), counts.reshape(-1).tolist(), strict=True)
        tags |= {f"{prefix}/{name}/position_{j:02d}": value for j, (value, count) in enumerate(data) if count > 0}
    return tags
