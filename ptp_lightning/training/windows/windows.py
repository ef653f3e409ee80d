"""Where the tokens of windows come from: the dataset, or the teacher's own samples. Others have files of their own.

A source answers, for every window of a batch, which tokens stand in it, which auxiliaries pick them, and from which
teacher distributions. A new source is one class with `sample`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick, token_interval
from ptp_lightning.auxiliary_strategies import AuxiliaryStrategy, UniformInInterval
from ptp_lightning.batch import PackedBatch
from ptp_lightning.distributions import Distributions, intervals
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import TokenDistribution, sizes_may_depend_on_values
from ptp_lightning.training.windows.student_proposals import DistributionPair, are_lazy, lazily, student_probe

SLOTS = (..., slice(1, None))
"""Positions of windows that slots predict, as an index into `[B, N, L]`."""


class WindowSample(NamedTuple):
    """The windows of a batch.

    Attributes:
        token_ids: `[B, N, L]` int64.
        auxiliaries: `[B, N, L]` float64; `pick(auxiliaries, teacher) == token_ids` wherever the mask is true.
        mask: `[B, N, L]` bool, true on a prefix of each window.
        teacher: `[B, N, L]` distributions that the tokens were picked from.
        target: `[B, N, L]` distributions that students learn, see `SamplingConfig.target`.
        conditioning_ids: `[B, N, L]` int64, the tokens that stand in the windows: the distributions at k follow those
            before k. They are `token_ids`, unless the student wrote the windows.
    """

    token_ids: Tensor
    auxiliaries: Tensor
    mask: Tensor
    teacher: Distributions
    target: Distributions
    conditioning_ids: Tensor


class WindowSource(ABC):
    """Fills the windows of a batch."""

    @abstractmethod
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """Tokens, auxiliaries and teacher distributions of every window; no gradients."""

    def choose(self, progress: float, generator: torch.Generator) -> "WindowSource":
        """The source of one training step, itself unless it is a mixture.

        Args:
            progress: share of the training steps that are done, 0 .. 1.
            generator: of the step.
        """
        return self

    @property
    def reads_rows(self) -> bool:
        """Whether windows hold the rows' own tokens."""
        return False


@dataclass(frozen=True)
class TeacherWindows(WindowSource):
    """The base model goes on from the context: u is drawn first, then t_k = Pick(u_k, Q_k), token after token.

    All windows of all rows advance together, in L - 1 cached calls of B x N tokens. A window ends after the
    end-of-text token.

    Args:
        strategy: draws the auxiliaries again, inside the intervals of the tokens; by default they stay as they are,
            uniform there.
    """

    strategy: AuxiliaryStrategy | None = None

    @torch.no_grad()
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        length = predictor.config.window_length
        shape = (*context.batch.window_starts.shape, length)
        auxiliaries = draw_auxiliaries(shape, generator, context.batch.input_ids.device)
        hidden = context.first_hidden
        tokens: list[Tensor] = []
        along = _Along(predictor, context)
        reader = predictor.window_reader(context, keeps=True)
        with predictor.gate.closed():
            for offset in range(length):
                if offset > 0:
                    newest = predictor.embed(tokens[-1]).unsqueeze(2)
                    hidden = reader.read(predictor.run_decoder, newest).squeeze(2)
                tokens.append(pick(auxiliaries[..., offset], along.add(hidden)))
        token_ids = torch.stack(tokens, dim=-1)
        mask = until_end(token_ids, context.end_of_text)
        teacher, target = along.result()
        if self.strategy is not None:
            interval = intervals(teacher, token_ids)
            auxiliaries = self.strategy.draw(*interval, generator, student_probe(predictor, context, token_ids))
        return WindowSample(token_ids, auxiliaries, mask, teacher, target, token_ids)


@dataclass(frozen=True)
class DatasetWindows(WindowSource):
    """The text itself; auxiliaries are drawn inside the interval of each token under the teacher (eq. 9).

    A window ends with its document, and before a token outside the teacher's truncated support, which no u picks.

    Args:
        strategy: draws the auxiliaries.
    """

    strategy: AuxiliaryStrategy = field(default_factory=UniformInInterval)

    @property
    def reads_rows(self) -> bool:
        """True: the tokens come from the row."""
        return True

    @torch.no_grad()
    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        """See `WindowSource.sample`."""
        length = predictor.config.window_length
        token_ids, mask = window_tokens(context.batch, length)
        hidden = hidden_before_tokens(context, length)
        if are_lazy(predictor, context):
            teacher, target = lazily(predictor, context, hidden)
            lower, upper = _intervals_of_text(predictor, context, length, mask)
        else:
            teacher, target = context.sampling.teacher_and_target(predictor.logits(hidden))
            lower, upper = token_interval(teacher, token_ids)
        mask = (mask & (upper > lower)).cumprod(-1).bool()
        auxiliaries = self.strategy.draw(lower, upper, generator, student_probe(predictor, context, token_ids))
        return WindowSample(token_ids, auxiliaries, mask, teacher, target, token_ids)


def window_tokens(batch: PackedBatch, length: int) -> tuple[Tensor, Tensor]:
    """The text itself: token ids `[B, N, L]`, and a bool mask, true up to the end of document and completion."""
    index = _window_index(batch, length)
    token_ids, documents, completion = (
        tensor.gather(1, index.flatten(1)).view_as(index)
        for tensor in (batch.input_ids, batch.document_ids, batch.completion_mask)
    )
    own_document = batch.document_ids.gather(1, batch.window_starts).unsqueeze(-1)
    inside = batch.window_starts.unsqueeze(-1) + torch.arange(length, device=index.device) < batch.input_ids.shape[1]
    return token_ids, (inside & completion & (documents == own_document)).cumprod(-1).bool()


def hidden_before_tokens(context: Context, length: int) -> Tensor:
    """`[B, N, L, H]`, the base model's last hidden states that predict the text's own tokens in each window."""
    index = _window_index(context.batch, length) - 1
    of_hidden = index.flatten(1).unsqueeze(-1).expand(-1, -1, context.hidden.shape[-1])
    return context.hidden.gather(1, of_hidden).unflatten(1, index.shape[1:])


def _intervals_of_text(
    predictor: PredictorNetwork, context: Context, length: int, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Intervals `[B, N, L]` of the windows' own tokens: each token of a row once, though windows overlap."""
    batch = context.batch
    index = _window_index(batch, length)
    if sizes_may_depend_on_values(index):
        needed = torch.zeros_like(batch.input_ids).scatter_add_(1, index.flatten(1), mask.flatten(1).long())
        row, place = needed.nonzero(as_tuple=True)
        teacher, _ = lazily(predictor, context, context.hidden[row, place - 1])
        ends = intervals(teacher, batch.input_ids[row, place])
        rows = [end.new_zeros(needed.shape).index_put((row, place), end) for end in ends]
    else:
        teacher, _ = lazily(predictor, context, context.hidden[:, :-1])
        rows = [torch.nn.functional.pad(end, (1, 0)) for end in intervals(teacher, batch.input_ids[:, 1:])]
    lower, upper = (row.gather(1, index.flatten(1)).view_as(index) for row in rows)
    return lower, upper


def _window_index(batch: PackedBatch, length: int) -> Tensor:
    """Row indices `[B, N, L]` of the windows' tokens; past the row, that of its last token."""
    offset = torch.arange(length, device=batch.window_starts.device)
    return (batch.window_starts.unsqueeze(-1) + offset).clamp_max(batch.input_ids.shape[1] - 1)


def until_end(token_ids: Tensor, end_of_text: int | None) -> Tensor:
    """`[..., L]` bool: true up to and including the first end-of-text token."""
    if end_of_text is None:
        return torch.ones_like(token_ids, dtype=torch.bool)
    ended = (token_ids == end_of_text).cumsum(-1)
    return (ended - (token_ids == end_of_text).long()) == 0


class _Along:
    """Distributions of L positions of windows, one after the other."""

    def __init__(self, predictor: PredictorNetwork, context: Context) -> None:
        self._predictor = predictor
        self._context = context
        self._is_lazy = are_lazy(predictor, context)
        self._hidden: list[Tensor] = []
        self._pairs: list[tuple[TokenDistribution, TokenDistribution]] = []

    def add(self, hidden: Tensor) -> TokenDistribution:
        """The teacher's at the next position, `[B, N]`, from `[B, N, H]`."""
        if self._is_lazy:
            self._hidden.append(hidden)
            return self._context.sampling.distribution(self._predictor.logits(hidden))
        self._pairs.append(self._context.sampling.teacher_and_target(self._predictor.logits(hidden)))
        return self._pairs[-1][0]

    def result(self) -> DistributionPair:
        """Teacher and target at all of them, `[B, N, L]`."""
        if self._is_lazy:
            return lazily(self._predictor, self._context, torch.stack(self._hidden, dim=2))
        teachers, targets = zip(*self._pairs, strict=True)
        return stack(list(teachers)), stack(list(targets))


def stack(distributions: list[TokenDistribution]) -> TokenDistribution:
    """Distributions `[B, N, K]` of L positions as one `[B, N, L, K]`."""
    probabilities = torch.stack([entry.probabilities for entry in distributions], dim=2)
    ids = [entry.token_ids for entry in distributions if entry.token_ids is not None]
    return TokenDistribution(probabilities, torch.stack(ids, dim=2) if ids else None)
