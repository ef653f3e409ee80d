"""InverseAutoregressiveModule: categorical parallel token prediction without a teacher, from data alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from ptp_lightning.auxiliary_strategies import RelativeStrategy, UniformInInterval
from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import (
    CrossEntropy,
    Loss,
    LossSum,
    PositionWeights,
    SlotTargets,
    UniformWeights,
    require_sound,
)
from ptp_lightning.metrics import PositionMeans, WindowMetrics, WindowSummary
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.context import Context
from ptp_lightning.models.slots.objectives import CategoricalObjective
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.modules.autoregressive import IGNORED_LABEL, next_token_labels
from ptp_lightning.training.modules.inversion import append_unused_auxiliary, invert
from ptp_lightning.training.modules.predictor_module import PredictorModule
from ptp_lightning.training.optimization import OptimizerSettings
from ptp_lightning.training.windows.dataset_windows import hidden_before_tokens, window_tokens
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.utils.randomness import keyed_generator


class InvertedWindows(NamedTuple):
    """Windows of the data with their inferred auxiliaries and the slots' hidden states.

    Attributes:
        token_ids: `[B, N, L]`.
        auxiliaries: `[B, N, L - 1]`, see `InverseAuxiliaries`.
        mask: `[B, N, L]` bool, a prefix of each window: the tokens that count.
        hidden: `[B, N, L - 1, H]`, hidden states of the slots, which predict the tokens 1 .. L - 1.
    """

    token_ids: Tensor
    auxiliaries: Tensor
    mask: Tensor
    hidden: Tensor


class InverseAutoregressiveModule(PredictorModule):
    """Train one network to predict windows from auxiliaries that it infers itself (IAT, Algorithm 3).

    A step reads the context once, with gradients; infers the auxiliaries of the windows' tokens without gradients
    (`invert`); and predicts all windows in one parallel pass with gradients, which also flow into the context. The loss
    is the cross entropy of the slots plus that of ordinary next-token prediction on the context, because decoding
    verifies with the same network.

    A window ends with its document, before a prompt token, and after a token of probability zero, which no auxiliary
    picks. Such a token still counts, because excluding it would overestimate the likelihood.

    Validation logs

    * `val/perplexity/position_XX` of held-out windows by the same procedure (position 00 is autoregressive);
    * `val/autoregressive_perplexity/position_XX` of the same tokens, given all tokens before them, and
      `val/autoregressive_perplexity` over all tokens;
    * `val/correct_tokens` and accuracies as in distillation, of windows that the network samples autoregressively.

    Args:
        predictor: with `student: SharedStudent` and the categorical objective; `backbone.from_config` starts from
            random weights.
        loss: cross entropy of next tokens; the default of slots too.
        strategy: draws each auxiliary in its token's interval.
        optimizer: optimiser and schedule.
        autoregressive_loss_weight: of the next-token loss per token relative to the loss per slot; with 0 the context's
            encoding is trained by the slots alone.
        seed: of all auxiliaries.
        slot_loss: of slots; by default `loss`, which compares them with the data's tokens as in the paper. A divergence
            compares them with the network's own next-token distributions along the data, which get no gradient. Both
            have the same optimum; the distributions are the less noisy target.
        position_weights: how much each slot of a window weighs in the slots' loss.
        activation_checkpointing: recompute decoder layers in the backward pass: less memory, more time.
        compile: `torch.compile` decoder layers in training; see `PredictorModule`.

    Raises:
        ValueError: the student, objective, loss, position weights, correction, draft vocabulary or temperature does not
            support teacher-free training; names the key.
    """

    def __init__(
        self,
        predictor: PredictorConfig,
        loss: CrossEntropy = CrossEntropy(),  # noqa: B008  frozen
        strategy: RelativeStrategy = UniformInInterval(),  # noqa: B008  frozen
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  frozen
        autoregressive_loss_weight: float = 1.0,
        seed: int = 0,
        slot_loss: Loss | None = None,
        position_weights: PositionWeights = UniformWeights(),  # noqa: B008  frozen
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        require_teacher_free(predictor)
        slot_loss = loss if slot_loss is None else slot_loss
        require_sound(slot_loss, predictor.objective.name)
        if not 0 <= autoregressive_loss_weight < math.inf:
            raise ValueError(
                f"expected model.init_args.autoregressive_loss_weight >= 0, found {autoregressive_loss_weight}"
            )
        if slot_loss.needs_target and autoregressive_loss_weight == 0:
            raise ValueError(
                "expected model.init_args.autoregressive_loss_weight > 0 beside model.init_args.slot_loss "
                f"{type(slot_loss).__name__}, found 0: the targets of the slots would not be trained"
            )
        if position_weights.needs_correct_probability:
            raise ValueError(
                "expected model.init_args.position_weights that depend on positions alone, found "
                f"{type(position_weights).__name__}: no teacher tells which drafts are correct; set UniformWeights or "
                "GeometricWeights"
            )
        super().__init__(predictor, optimizer, activation_checkpointing, compile)
        self.loss = loss
        self.slot_loss = slot_loss
        self.position_weights = position_weights
        self.strategy = strategy
        self.autoregressive_loss_weight = autoregressive_loss_weight
        self.seed = seed
        self.likelihoods = WindowMetrics(predictor.window_length)
        self.autoregressive_nats = PositionMeans(predictor.window_length)
        self.window_metrics = WindowMetrics(predictor.window_length)
        self.next_token_nats = MeanMetric()
        self.val_summary: WindowSummary | None = None

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss in nats per slot, plus the weighted loss per token; each normalised by its count over all ranks.

        With accumulated batches the first is normalised by the slots of the whole step. The second is exact if all
        micro-batches have as many tokens per slot; otherwise it weighs those with more slots a little more.
        """
        generator = keyed_generator(self.seed, "train", self.global_rank, self.global_step, self.micro_batch)
        context = self._encode(batch)
        windows = self._inverted(context, generator)
        slot_loss = self._slot_loss(context, windows)
        labels = next_token_labels(batch)
        token_loss = self._sum(self.loss, context.hidden, labels, labels != IGNORED_LABEL)
        slot_nats, token_nats = torch.stack([slot_loss.total, token_loss.total]) / self._mean_counts(
            batch, slot_loss, token_loss
        )
        total = slot_nats + self.autoregressive_loss_weight * token_nats
        self.log("train/loss_nats", slot_nats.detach(), prog_bar=True)
        self.log("train/autoregressive_loss_nats", token_nats.detach())
        return total * self._share_of_step()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Likelihood of held-out windows, and agreement with the network's own samples."""
        self._evaluate(batch, keyed_generator(self.seed, "val", self.global_rank, batch_idx))

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate(batch, keyed_generator(self.seed, "test", self.global_rank, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Log the tags of the finished validation."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the tags of the finished test."""
        self._log_metrics("test")

    @torch.no_grad()
    def _evaluate(self, batch: PackedBatch, generator: torch.Generator) -> None:
        context = self._encode(batch)
        windows = self._inverted(context, generator)
        hidden = torch.cat([context.first_hidden.unsqueeze(2), windows.hidden], dim=2)
        logits = self.predictor.slot_logits(hidden).float()
        nll = F.cross_entropy(logits.flatten(0, 2), windows.token_ids.flatten(), reduction="none")
        # The auxiliaries pick the data's tokens, so all are correct; `window_metrics` measures what decoding accepts.
        self.likelihoods.update(windows.mask, windows.mask, nll.view(windows.mask.shape))

        length = windows.mask.shape[-1]
        logits = self.predictor.logits(hidden_before_tokens(context, length)).float()
        nll = F.cross_entropy(logits.flatten(0, 2), windows.token_ids.flatten(), reduction="none")
        positions = torch.arange(length, device=nll.device).expand_as(windows.mask)
        self.autoregressive_nats.update(nll.view_as(positions)[windows.mask], positions[windows.mask])

        labels = next_token_labels(batch)
        total, count = self._sum(self.loss, context.hidden, labels, labels != IGNORED_LABEL)
        self.next_token_nats.update(total / count.clamp_min(1), count)

        sample = TeacherWindows().sample(self.predictor, context, generator)
        logits = self.predictor.slot_logits(self.predictor.slot_hidden(context, sample.auxiliaries)).float()
        objective = self.predictor.config.objective
        drafted = objective.tokens_from_logits(logits, sample.auxiliaries[..., 1:], context.sampling)
        self.window_metrics.update(
            torch.cat([sample.token_ids[..., :1], drafted], dim=-1) == sample.token_ids, sample.mask
        )

    def _log_metrics(self, stage: str) -> None:
        likelihoods = self.likelihoods.compute()
        nats = self.next_token_nats.compute()
        reference = {
            f"{stage}/autoregressive_perplexity/position_{j:02d}": math.exp(mean)
            for j, mean in self.autoregressive_nats.compute().items()
        }
        self._log_summary(
            stage,
            self.window_metrics.compute()._replace(
                perplexity=likelihoods.perplexity, num_likelihoods=likelihoods.num_likelihoods
            ),
            reference,
        )
        self.log(f"{stage}/autoregressive_perplexity", nats.exp(), rank_zero_only=True)
        for metric in (self.likelihoods, self.autoregressive_nats, self.window_metrics, self.next_token_nats):
            metric.reset()

    def _inverted(self, context: Context, generator: torch.Generator) -> InvertedWindows:
        """The data's tokens, their auxiliaries, and the slots' hidden states of one parallel pass."""
        token_ids, mask = window_tokens(context.batch, self.predictor.config.window_length)
        auxiliaries = invert(self.predictor, context, token_ids, self.strategy, generator)
        # Without an auxiliary for token k there is no slot in its place, so k is the last predicted token.
        mask = mask & F.pad(auxiliaries.found.cumprod(-1).bool(), (1, 0), value=True)
        hidden = self.predictor.slot_hidden(context, append_unused_auxiliary(auxiliaries.values))
        return InvertedWindows(token_ids, auxiliaries.values, mask, hidden)

    def _slot_loss(self, context: Context, windows: InvertedWindows) -> LossSum:
        target = self._autoregressive_targets(context) if self.slot_loss.needs_target else None
        weights = self.position_weights(windows.mask[..., 1:])
        return self._sum(self.slot_loss, windows.hidden, windows.token_ids[..., 1:], weights, target)

    @torch.no_grad()
    def _autoregressive_targets(self, context: Context) -> TokenDistribution:
        """Next-token distributions for the slots' tokens, given all tokens before them: `[B * N * (L - 1), K]`."""
        hidden = hidden_before_tokens(context, self.predictor.config.window_length)[..., 1:, :]
        return context.sampling.teacher_and_target(self.predictor.logits(hidden.flatten(0, 2)))[1]

    def _sum(
        self, loss: Loss, hidden: Tensor, token_ids: Tensor, weights: Tensor, target: TokenDistribution | None = None
    ) -> LossSum:
        """A loss of hidden states `[..., H]` that predict tokens `[...]`, with weights `[...]`; 0 masks."""
        targets = SlotTargets(token_ids.flatten(), target, weights.flatten().to(torch.float32))
        return loss(hidden.flatten(0, -2), self.predictor.slot_logits, targets)


def require_teacher_free(config: PredictorConfig) -> None:
    """Refuse a predictor that Algorithm 3 cannot train.

    Raises:
        ValueError: with the reason and the key to change.
    """
    if not config.student.trains_base:
        raise ValueError(
            "expected one network that is trained as a whole, because teacher-free training has no frozen model, found "
            f"{type(config.student).__name__}: set predictor.student to ptp_lightning.models.SharedStudent"
        )
    if config.objective.name != CategoricalObjective.name:
        raise ValueError(
            f"expected the categorical objective, found {config.objective.name}: an auxiliary is drawn in its token's "
            "interval of a prediction that is not conditioned on it; one_hot slots are conditioned on it, and "
            "independent and sequential slots are conditioned on no auxiliary: set predictor.objective to "
            "ptp_lightning.models.CategoricalObjective"
        )
    if config.correction is not None:
        raise ValueError(
            f"expected no predictor.correction, found {type(config.correction).__name__}: auxiliaries are inferred "
            "from the slots' predictions, and only distillation trains a correction; set it to null"
        )
    if config.draft_vocabulary is not None:
        raise ValueError(
            f"expected no predictor.draft_vocabulary, found {config.draft_vocabulary}: auxiliaries are inferred from "
            "the slots' predictions, which must know every token; set it to null"
        )
    if config.sampling.temperature != 1:
        raise ValueError(
            f"expected predictor.sampling.temperature 1, found {config.sampling.temperature}: slots that "
            "learn from data learn the distribution at temperature 1; set it to 1"
        )
    if config.sampling_range is not None:
        raise ValueError(
            f"expected no predictor.sampling_range, found {config.sampling_range}: slots that learn from "
            "data learn the distribution at temperature 1; set it to null"
        )
