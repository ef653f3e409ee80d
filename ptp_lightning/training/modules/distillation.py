"""DistillationModule: train a student on a teacher's distributions and samples."""

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptp_lightning.auxiliary import pick
from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import (
    KullbackLeibler,
    Loss,
    LossSum,
    PositionWeights,
    SlotTargets,
    UniformWeights,
    over_draft_vocabulary,
    require_sound,
)
from ptp_lightning.metrics import PositionMeans, WeightedMean, WindowMetrics, as_tags
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.context import Context
from ptp_lightning.sampling import Sampler, SamplingConfig
from ptp_lightning.training.modules.best_of import best_of
from ptp_lightning.training.modules.correct_probability import correct_probability
from ptp_lightning.training.modules.predictor_module import PredictorModule
from ptp_lightning.training.optimization import OptimizerSettings
from ptp_lightning.training.windows.student_draft import StudentDraft, student_draft
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import SLOT_POSITIONS, WindowSample, WindowSource
from ptp_lightning.utils.randomness import keyed_generator


class DistillationModule(PredictorModule):
    """Train a student's slots to predict what the frozen base model samples (Algorithm 2 of Draxler et al., ICLR 2026).

    Every step runs the base model over the packed contexts, fills the windows from `source`, and trains the slots on
    them. Checkpoints hold the student (the adapter, or the trained copy), the slot encoder and the predictor's
    configuration, but no frozen weight.

    Validation logs `val/loss_nats`, the trained loss on its windows, beside what drafts of these windows are worth.

    Args:
        predictor: the base model and everything that is trained.
        loss: compares a slot's prediction with its target; must be sound for the objective.
        source: of the windows in training.
        val_source: of the windows in validation; the teacher's own samples are what decoding has to predict.
        optimizer: optimiser and schedule.
        first_pass_loss_weight: weight of the loss before correction relative to the loss after it. It has no effect
            without a correction, and with one that drafts from left to right, which uses corrected predictions alone.
        num_drafts: M; if M > 1, validation also drafts every window M times, chooses the draft whose auxiliaries lie
            closest to the centres of their intervals, and logs `val/correct_tokens_best_of_{M}` (see
            `ptp_lightning.training.modules.best_of`).
        seed: of all auxiliaries.
        position_weights: how much each slot of a window weighs in both losses.
        val_sampling: settings to validate in addition to `predictor.sampling`, with the same auxiliaries and the order
            of `predictor.sampling`; logged as `val/correct_tokens/temperature_0.50`, see `sampling_label`.
        activation_checkpointing: recompute decoder layers in the backward pass: less memory, more time.
        compile: `torch.compile` decoder layers in training; see `PredictorModule`.
    """

    def __init__(
        self,
        predictor: PredictorConfig,
        loss: Loss = KullbackLeibler(),  # noqa: B008  frozen
        source: WindowSource = TeacherWindows(),  # noqa: B008  frozen
        val_source: WindowSource = TeacherWindows(),  # noqa: B008  frozen
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  frozen
        first_pass_loss_weight: float = 0.5,
        num_drafts: int = 1,
        seed: int = 0,
        position_weights: PositionWeights = UniformWeights(),  # noqa: B008  frozen
        val_sampling: tuple[SamplingConfig, ...] = (),
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        require_sound(loss, predictor.objective.name)
        if predictor.student.trains_base:
            raise ValueError(
                "expected a student with a frozen teacher, found SharedStudent, which would change its own target "
                "distributions: set predictor.student to FullCopyStudent or GatedLoraStudent, or train without a "
                "teacher (InverseAutoregressiveModule)"
            )
        super().__init__(predictor, optimizer, activation_checkpointing, compile)
        self.loss = loss
        self.source = source
        self.val_source = val_source
        if not 0 <= first_pass_loss_weight < math.inf:
            raise ValueError(f"expected model.init_args.first_pass_loss_weight >= 0, found {first_pass_loss_weight}")
        self.first_pass_loss_weight = first_pass_loss_weight
        if num_drafts < 1:
            raise ValueError(f"expected model.init_args.num_drafts >= 1, found {num_drafts}")
        self.num_drafts = num_drafts
        self.seed = seed
        self.position_weights = position_weights
        default = predictor.sampling
        self.val_sampling = {
            sampling_label(sampling, default): replace(sampling, order=default.order) for sampling in val_sampling
        }
        if len(self.val_sampling) < len(val_sampling):
            raise ValueError(f"expected different settings in model.init_args.val_sampling, found {val_sampling}")
        self.val_sampling_metrics = nn.ModuleList(WindowMetrics(predictor.window_length) for _ in val_sampling)
        self.val_metrics = WindowMetrics(predictor.window_length)
        self.val_loss = WeightedMean()
        self.val_divergences = PositionMeans(predictor.window_length)
        self.best_of_metrics = WindowMetrics(predictor.window_length)

    @property
    def reads_windows_from_rows(self) -> bool:
        """False if all windows are sampled: those may extend beyond the end of a row."""
        return self.source.reads_rows or self.val_source.reads_rows

    def shared_steps(self, total_steps: int) -> int:
        """See `TrainingModule`; none if the choice of windows depends on the fraction of steps that are done."""
        return 0 if self.source.depends_on_progress else super().shared_steps(total_steps)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss in nats per slot, normalised by the weights of the slots of all ranks."""
        generator = keyed_generator(self.seed, "train", self.global_rank, self.global_step, self.micro_batch)
        context = self._encode(batch, self._training_settings())
        progress = min(1.0, self.global_step / self.trainer.estimated_stepping_batches)
        # Not keyed by the rank: all ranks make the same choice, see `MixtureWindows`.
        source = self.source.choose(progress, keyed_generator(self.seed, "source", self.global_step, self.micro_batch))
        sample = source.sample(self.predictor, context, generator)
        hidden = self.predictor.slot_hidden(context, sample.auxiliaries, sample.conditioning_ids[..., 0])
        corrects = self.predictor.correction is not None
        if self.predictor.corrects_left_to_right:
            prediction = first_pass = self._corrected_loss(context, hidden, sample)
        else:
            prediction = first_pass = self._first_pass_loss(context, hidden, sample)
            if corrects:
                prediction = self._corrected_loss(context, hidden, sample)
        # Both losses count the same slots, but weights may depend on the student's predictions.
        mean_count, first_pass_count = self._mean_counts(batch, prediction, first_pass)
        total = prediction.total
        if first_pass is not prediction:
            # The ratio is exactly 1 if the weights do not depend on the student.
            total = total + self.first_pass_loss_weight * (first_pass.total * (mean_count / first_pass_count))
        self.log("train/loss_nats", prediction.total.detach() / mean_count, prog_bar=True)
        if not self.predictor.corrects_left_to_right:
            self.log("train/first_pass_loss_nats", first_pass.total.detach() / first_pass_count)
        return total / mean_count * self._share_of_step()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Draft every window and compare with the teacher's picks for the same auxiliaries."""
        self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate(batch, "test", batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the tags of the finished validation."""
        self._log_window_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the tags of the finished test."""
        self._log_window_metrics("test")

    def _training_settings(self) -> SamplingConfig:
        """Sampling settings of this batch; each rank and micro-batch draws its own, so that a step averages."""
        config = self.predictor.config
        if config.sampling_range is None:
            return config.sampling
        generator = keyed_generator(self.seed, "sampling", self.global_rank, self.global_step, self.micro_batch)
        return config.sampling_range.draw(config.sampling, generator)

    def _first_pass_loss(self, context: Context, hidden: Tensor, sample: WindowSample) -> LossSum:
        return self._slot_loss(hidden, sample, context.sampling)

    def _corrected_loss(self, context: Context, hidden: Tensor, sample: WindowSample) -> LossSum:
        """Loss of corrected slots that are conditioned on the same tokens as the teacher's distributions.

        In windows of the teacher or the dataset these are the correct tokens: decoding uses a slot only if all tokens
        before it are correct, so training assumes it. In windows that the student wrote they are the student's.
        """
        pairs = self.predictor.correction_context(context)
        corrected = self.predictor.correct(context, pairs, hidden, sample.conditioning_ids[..., :-1])
        return self._slot_loss(corrected, sample, context.sampling)

    def _trained_loss(self, context: Context, hidden: Tensor, sample: WindowSample) -> LossSum:
        """The loss that training logs as `train/loss_nats`: of corrected slots, where there is a correction."""
        loss = self._first_pass_loss if self.predictor.correction is None else self._corrected_loss
        return loss(context, hidden, sample)

    def _slot_loss(self, hidden: Tensor, sample: WindowSample, sampling: Sampler) -> LossSum:
        """Loss of the slots' states `[B, N, L - 1, ..]`, for `slot_logits`; tokens are drafted with `sampling`."""
        mask = sample.mask[..., 1:]
        flat = sample.target.at(SLOT_POSITIONS).flatten()
        targets = SlotTargets(sample.token_ids[..., 1:].flatten(), flat, mask.flatten().to(torch.float32))
        measure = (
            correct_probability(self.predictor, sample, sampling)
            if self.position_weights.needs_correct_probability
            else None
        )
        loss = over_draft_vocabulary(self.loss, sampling.draft_vocabulary)
        losses = loss.slot_losses(hidden.flatten(0, 2), self.predictor.slot_logits, targets, measure)
        return loss.weighted_sum(losses, self.position_weights(mask, losses.measured_on(mask)).flatten())

    def _log_window_metrics(self, stage: str) -> None:
        more: dict[str, float] = {}
        summary = self.val_metrics.compute()
        if summary.num_positions.reshape(-1)[1:].sum() > 0:  # there were slots
            more[f"{stage}/loss_nats"] = float(self.val_loss.compute())
        if self.predictor.config.objective.predicts_distribution:
            more |= {f"{stage}/kl/position_{j:02d}": mean for j, mean in self.val_divergences.compute().items()}
        if self.num_drafts > 1:
            best = self.best_of_metrics.compute()
            if best.num_windows > 0:
                more[f"{stage}/correct_tokens_best_of_{self.num_drafts}"] = float(best.correct_tokens)
        for label, metrics in self._metrics_by_label().items():
            tags = as_tags(metrics.compute(), stage)
            names = (f"{stage}/correct_tokens", f"{stage}/correct_tokens_standard_error")
            more |= {f"{name}/{label}": tags[name] for name in names if name in tags}
            metrics.reset()
        self._log_summary(stage, summary, more)
        for metric in (self.val_metrics, self.val_loss, self.val_divergences, self.best_of_metrics):
            metric.reset()

    def _metrics_by_label(self) -> dict[str, WindowMetrics]:
        """Metrics of the additional settings, by `sampling_label`."""
        return dict(zip(self.val_sampling, cast("list[WindowMetrics]", self.val_sampling_metrics), strict=True))

    @torch.no_grad()
    def _evaluate(self, batch: PackedBatch, stage: str, batch_idx: int) -> None:
        context = self._encode(batch)
        keys = (self.seed, stage, self.global_rank, batch_idx)
        generator = keyed_generator(*keys)
        source = self.val_source.choose(1.0, keyed_generator(self.seed, "source", stage, batch_idx))
        sample, draft, logits = self._measure(context, source, generator, self.val_metrics)
        if self.predictor.config.objective.predicts_distribution:
            target, mask = sample.target.at(SLOT_POSITIONS).flatten().materialize(), sample.mask[..., 1:]
            divergence = over_draft_vocabulary(KullbackLeibler(), context.sampling.draft_vocabulary)
            divergences = divergence.per_slot(logits.flatten(0, -2), sample.token_ids[..., 1:].flatten(), target)
            positions = torch.arange(1, self.predictor.config.window_length, device=mask.device).expand_as(mask)
            self.val_divergences.update(divergences.view_as(mask)[mask], positions[mask])
        del logits  # before those of the loss
        self.val_loss.update(*self._trained_loss(context, draft.slots, sample))
        if self.num_drafts > 1:
            chosen = best_of(self.num_drafts, self.predictor, context, generator)
            self.best_of_metrics.update(*chosen)
        for label, metrics in self._metrics_by_label().items():
            sampler = self.predictor.sampler(self.val_sampling[label])
            self._measure(context._replace(sampling=sampler), source, keyed_generator(*keys), metrics)

    def _measure(
        self,
        context: Context,
        source: WindowSource,
        generator: torch.Generator,
        metrics: WindowMetrics,
    ) -> tuple[WindowSample, StudentDraft, Tensor]:
        """Windows under the settings of the context, and the student's draft and logits `[B, N, L - 1, ..]` of them."""
        sample = source.sample(self.predictor, context, generator)
        # The first token needs no slot: decoding picks it from the base model's own distribution.
        first = sample.teacher.at((..., 0)).materialize()
        first_nll = -first.probability_of(sample.token_ids[..., 0]).log()
        draft = student_draft(self.predictor, context, sample.auxiliaries, pick(sample.auxiliaries[..., 0], first))
        logits = self.predictor.slot_logits(draft.hidden).float()
        columns, found = sample.token_ids[..., 1:], None
        if context.sampling.draft_vocabulary is not None:
            columns, found = context.sampling.draft_vocabulary.columns(columns)
            found = F.pad(found, (1, 0), value=True)
        nll = F.cross_entropy(logits.flatten(0, -2), columns.flatten(), reduction="none")
        metrics.update(
            draft.token_ids == sample.token_ids,
            sample.mask,
            torch.cat([first_nll.unsqueeze(-1), nll.view_as(logits[..., 0])], dim=-1),
            found,
        )
        return sample, draft, logits


def sampling_label(sampling: SamplingConfig, default: SamplingConfig) -> str:
    """A name of settings: the temperature, and top-k and top-p if they differ from the default.

    >>> sampling_label(SamplingConfig(temperature=0.5, top_k=20), default=SamplingConfig())
    'temperature_0.50_top_k_20'
    """
    others = [
        f"_{name}_{getattr(sampling, name)}"
        for name in ("top_k", "top_p")
        if getattr(sampling, name) != getattr(default, name)
    ]
    return f"temperature_{sampling.temperature:.2f}" + "".join(others)
