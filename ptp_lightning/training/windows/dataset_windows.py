"""DatasetWindows: the tokens of the rows themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptp_lightning.auxiliary import token_interval
from ptp_lightning.auxiliary_strategies import AuxiliaryStrategy, UniformInInterval
from ptp_lightning.batch import PackedBatch
from ptp_lightning.distributions import chunked_token_interval
from ptp_lightning.models.context import Context
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import allows_dynamic_shapes
from ptp_lightning.training.windows.student_probe import student_probe
from ptp_lightning.training.windows.teacher_distributions import are_lazy, lazy_distributions
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource


@dataclass(frozen=True)
class DatasetWindows(WindowSource):
    """Windows of the dataset; auxiliaries are drawn inside the interval of each token under the teacher (eq. 9).

    A window ends with its document, and before a token that the teacher's sampling settings exclude, because no u picks
    such a token.

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
            teacher, target = lazy_distributions(predictor, context, hidden)
            lower, upper = _intervals_of_rows(predictor, context, length, mask)
        else:
            teacher, target = context.sampling.teacher_and_target(predictor.logits(hidden))
            lower, upper = token_interval(teacher, token_ids)
        mask = (mask & (upper > lower)).cumprod(-1).bool()
        auxiliaries = self.strategy.draw(lower, upper, generator, student_probe(predictor, context, token_ids))
        return WindowSample(token_ids, auxiliaries, mask, teacher, target, conditioning_ids=token_ids)


def window_tokens(batch: PackedBatch, length: int) -> tuple[Tensor, Tensor]:
    """The rows' own tokens in each window.

    Returns:
        Token ids `[B, N, L]`, and a bool mask, true up to the end of the document and of the completion.
    """
    index = _window_index(batch, length)
    token_ids, documents, completion = (
        tensor.gather(1, index.flatten(1)).view_as(index)
        for tensor in (batch.input_ids, batch.document_ids, batch.completion_mask)
    )
    own_document = batch.document_ids.gather(1, batch.window_starts).unsqueeze(-1)
    inside = batch.window_starts.unsqueeze(-1) + torch.arange(length, device=index.device) < batch.input_ids.shape[1]
    return token_ids, (inside & completion & (documents == own_document)).cumprod(-1).bool()


def hidden_before_tokens(context: Context, length: int) -> Tensor:
    """`[B, N, L, H]`, the base model's last hidden states that predict the tokens of `window_tokens`."""
    index = _window_index(context.batch, length) - 1
    of_hidden = index.flatten(1).unsqueeze(-1).expand(-1, -1, context.hidden.shape[-1])
    return context.hidden.gather(1, of_hidden).unflatten(1, index.shape[1:])


def _intervals_of_rows(
    predictor: PredictorNetwork, context: Context, length: int, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Intervals `[B, N, L]` of the windows' tokens; each token of a row is evaluated once, although windows overlap."""
    batch = context.batch
    index = _window_index(batch, length)
    if allows_dynamic_shapes(index):
        needed = torch.zeros_like(batch.input_ids).scatter_add_(1, index.flatten(1), mask.flatten(1).long())
        row, column = needed.nonzero(as_tuple=True)
        teacher, _ = lazy_distributions(predictor, context, context.hidden[row, column - 1])
        ends = chunked_token_interval(teacher, batch.input_ids[row, column])
        rows = [end.new_zeros(needed.shape).index_put((row, column), end) for end in ends]
    else:
        teacher, _ = lazy_distributions(predictor, context, context.hidden[:, :-1])
        rows = [torch.nn.functional.pad(end, (1, 0)) for end in chunked_token_interval(teacher, batch.input_ids[:, 1:])]
    lower, upper = (row.gather(1, index.flatten(1)).view_as(index) for row in rows)
    return lower, upper


def _window_index(batch: PackedBatch, length: int) -> Tensor:
    """Row indices `[B, N, L]` of the windows' tokens; beyond the end of the row, that of its last token."""
    offset = torch.arange(length, device=batch.window_starts.device)
    return (batch.window_starts.unsqueeze(-1) + offset).clamp_max(batch.input_ids.shape[1] - 1)
