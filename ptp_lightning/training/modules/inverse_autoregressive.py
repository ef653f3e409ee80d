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
from ptp_lightning.training.modules.inversion import followed_by_nothing, invert
from ptp_lightning.training.modules.predictor_module import PredictorModule
from ptp_lightning.training.optimization import OptimizerSettings
from ptp_lightning.training.windows.dataset_windows import hidden_before_tokens, window_tokens
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.utils.randomness import keyed_generator


class FilledWindows(NamedTuple):
    """Windows of the data and what the slots say about them.

    Attributes:
        token_ids: `[B, N, L]`.
        auxiliaries: `[B, N, L - 1]`, see `InverseAuxiliaries`.
        mask: `[B, N, L]` bool, a prefix of each window: the tokens whose likelihood counts.
        hidden: `[B, N, L - 1, H]`, of the slots, which predict the tokens 1 .. L - 1.
    """

    token_ids: Tensor
    auxiliaries: Tensor
    mask: Tensor
    hidden: Tensor


class InverseAutoregressiveModule(PredictorModule):
    """Train one network to predict windows from auxiliaries that it infers itself (IAT, Algorithm 3).

    A step reads the context once, with gradients; finds the auxiliaries of the windows' tokens without (`invert`); and
    predicts all windows in one parallel pass with gradients, which flow through the context too. The loss is the cross
    entropy of the slots, plus that of ordinary next-token prediction on the context: the network stays the
    autoregressive model that decoding verifies with.

    A window ends with its document, before a prompt token, and behind a token of probability zero, which no auxiliary
    names. Such a token still counts: leaving it out would flatter the likelihood.

    Validation logs `val/perplexity/position_XX` of held-out windows by the same procedure (position 00 is the
    autoregressive model's own); beside it `val/autoregressive_perplexity/position_XX`, what the network says of these
    tokens when it reads all tokens before them; `val/autoregressive_perplexity` over all tokens; and
    `val/correct_tokens` with its accuracies as distillation does: what decoding would accept of windows that the
    network's own samples fill.

    Args:
        predictor: with `student: SharedStudent` and the categorical objective; `backbone.from_config` starts from
            random weights.
        loss: cross entropy, of next tokens, and of slots by default.
        strategy: where in its token's interval an auxiliary lies.
        optimizer: optimiser and schedule.
        autoregressive_loss_weight: of the next-token loss per token against the loss per slot; 0 leaves it out, so that
            only the slots' view of the context trains its encoding.
        seed: of all auxiliaries.
        slot_loss: of slots; by default `loss`, which compares them with the data's tokens as in the paper. A divergence
            compares them with the network's own next-token distributions along the data, which get no gradient. Both
            have the same optimum; the distributions are the less noisy target.
        position_weights: how much each slot of a window weighs in the slots' loss.
        activation_checkpointing: compute what decoder layers remember again in the backward pass instead: less memory,
            more time.
        compile: run decoder layers through `torch.compile` where gradients are wanted; see `PredictorModule`.

    Raises:
        ValueError: the student, objective, loss, position weights, refiner or temperature has no teacher-free training;
            names the key.
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
                f"{type(slot_loss).__name__}, found 0: slots would learn predictions that nothing trains"
            )
        if position_weights.needs_correct_probability:
            raise ValueError(
                "expected model.init_args.position_weights that depend on positions alone, found "
                f"{type(position_weights).__name__}: no teacher says which proposals are right; set UniformWeights or "
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
        self.reference_nats = PositionMeans(predictor.window_length)
        self.agreement = WindowMetrics(predictor.window_length)
        self.next_token_nats = MeanMetric()
        self.val_summary: WindowSummary | None = None

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss in nats per slot, plus the weighted loss per token; each normalised by its count over all ranks."""
        generator = keyed_generator(self.seed, "train", self.global_rank, self.global_step, batch_idx)
        context = self._encode(batch)
        windows = self._fill(context, generator)
        slot_loss = self._slot_loss(context, windows)
        labels = next_token_labels(batch)
        token_loss = self._sum(self.loss, context.hidden, labels, labels != IGNORED_LABEL)
        slot_nats, token_nats = torch.stack([slot_loss.total, token_loss.total]) / self._mean_counts(
            batch, slot_loss, token_loss
        )
        total = slot_nats + self.autoregressive_loss_weight * token_nats
        self.log("train/loss_nats", slot_nats.detach(), prog_bar=True)
        self.log("train/autoregressive_loss_nats", token_nats.detach())
        return total

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
        windows = self._fill(context, generator)
        hidden = torch.cat([context.first_hidden.unsqueeze(2), windows.hidden], dim=2)
        logits = self.predictor.slot_logits(hidden).float()
        nll = F.cross_entropy(logits.flatten(0, 2), windows.token_ids.flatten(), reduction="none")
        # The data's tokens are right by construction; what decoding would accept is measured below.
        self.likelihoods.update(windows.mask, windows.mask, nll.view(windows.mask.shape))

        length = windows.mask.shape[-1]
        logits = self.predictor.logits(hidden_before_tokens(context, length)).float()
        nll = F.cross_entropy(logits.flatten(0, 2), windows.token_ids.flatten(), reduction="none")
        positions = torch.arange(length, device=nll.device).expand_as(windows.mask)
        self.reference_nats.update(nll.view_as(positions)[windows.mask], positions[windows.mask])

        labels = next_token_labels(batch)
        total, count = self._sum(self.loss, context.hidden, labels, labels != IGNORED_LABEL)
        self.next_token_nats.update(total / count.clamp_min(1), count)

        sample = TeacherWindows().sample(self.predictor, context, generator)
        logits = self.predictor.slot_logits(self.predictor.slot_hidden(context, sample.auxiliaries)).float()
        objective = self.predictor.config.objective
        proposed = objective.tokens_from_logits(logits, sample.auxiliaries[..., 1:], context.sampling)
        self.agreement.update(torch.cat([sample.token_ids[..., :1], proposed], dim=-1) == sample.token_ids, sample.mask)

    def _log_metrics(self, stage: str) -> None:
        likelihoods = self.likelihoods.compute()
        nats = self.next_token_nats.compute()
        reference = {
            f"{stage}/autoregressive_perplexity/position_{j:02d}": math.exp(mean)
            for j, mean in self.reference_nats.compute().items()
        }
        self._log_summary(
            stage,
            self.agreement.compute()._replace(
                perplexity=likelihoods.perplexity, num_likelihoods=likelihoods.num_likelihoods
            ),
            reference,
        )
        self.log(f"{stage}/autoregressive_perplexity", nats.exp(), rank_zero_only=True)
        for metric in (self.likelihoods, self.reference_nats, self.agreement, self.next_token_nats):
            metric.reset()

    def _fill(self, context: Context, generator: torch.Generator) -> FilledWindows:
        """The data's tokens, their auxiliaries, and one parallel pass over all slots."""
        token_ids, mask = window_tokens(context.batch, self.predictor.config.window_length)
        auxiliaries = invert(self.predictor, context, token_ids, self.strategy, generator)
        # Without an auxiliary for token k no slot can stand for it, so k is the last that is predicted.
        mask = mask & F.pad(auxiliaries.found.cumprod(-1).bool(), (1, 0), value=True)
        hidden = self.predictor.slot_hidden(context, followed_by_nothing(auxiliaries.values))
        return FilledWindows(token_ids, auxiliaries.values, mask, hidden)

    def _slot_loss(self, context: Context, windows: FilledWindows) -> LossSum:
        target = self._own_predictions(context) if self.slot_loss.needs_target else None
        weights = self.position_weights(windows.mask[..., 1:])
        return self._sum(self.slot_loss, windows.hidden, windows.token_ids[..., 1:], weights, target)

    @torch.no_grad()
    def _own_predictions(self, context: Context) -> TokenDistribution:
        """What the network says of the slots' tokens when it reads the tokens before them: `[B * N * (L - 1), K]`."""
        hidden = hidden_before_tokens(context, self.predictor.config.window_length)[..., 1:, :]
        return context.sampling.teacher_and_target(self.predictor.logits(hidden.flatten(0, 2)))[1]

    def _sum(
        self, loss: Loss, hidden: Tensor, token_ids: Tensor, weights: Tensor, target: TokenDistribution | None = None
    ) -> LossSum:
        """A loss of hidden states `[..., H]` that stand before tokens `[...]`, with weights `[...]`; 0 leaves out."""
        targets = SlotTargets(token_ids.flatten(), target, weights.flatten().to(torch.float32))
        return loss(hidden.flatten(0, -2), self.predictor.slot_logits, targets)


def require_teacher_free(config: PredictorConfig) -> None:
    """Refuse a predictor that Algorithm 3 cannot train.

    Raises:
        ValueError: with the reason and the key that mends it.
    """
    if not config.student.trains_base:
        raise ValueError(
            "expected one network that is trained as a whole, for teacher-free training has no frozen model, found "
            f"{type(config.student).__name__}: set predictor.student to ptp_lightning.models.SharedStudent"
        )
    if config.objective.name != CategoricalObjective.name:
        raise ValueError(
            f"expected the categorical objective, found {config.objective.name}: an auxiliary is drawn in the interval "
            "of its token under what a slot predicts before it is told that auxiliary, so a slot that is told it "
            "(one_hot) has nothing to draw from, and one that is told none (independent, sequential) would not notice: "
            "set predictor.objective to ptp_lightning.models.CategoricalObjective"
        )
    if config.refiner.num_layers:
        raise ValueError(
            f"expected no refiner, found predictor.refiner.num_layers {config.refiner.num_layers}: auxiliaries are "
            "inferred from what slots say, and only distillation trains a refiner beside them; set it to 0"
        )
    if config.sampling.temperature != 1:
        raise ValueError(
            f"expected predictor.sampling.temperature 1, found {config.sampling.temperature}: the data are what a "
            "network at temperature 1 learns to sample, and slots that learned from data know no other; set it to 1"
        )
    if config.sampling_range is not None:
        raise ValueError(
            f"expected no predictor.sampling_range, found {config.sampling_range}: slots that learned from data know "
            "temperature 1 alone; set it to null"
        )
