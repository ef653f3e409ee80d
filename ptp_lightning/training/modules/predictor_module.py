"""PredictorModule: the base class of LightningModules that train a predictor; checks and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.completions.completions import FOLDER_KEY, CompletionSettings
from ptp_lightning.data.completions.completions_datamodule import CompletionsDataModule
from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.draft_vocabulary import first_tokens, most_frequent_tokens
from ptp_lightning.export.checkpoint import require_same_predictor
from ptp_lightning.export.migrations import FORMAT_VERSION, migrate_checkpoint
from ptp_lightning.metrics import WindowSummary, as_tags
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.context import Context
from ptp_lightning.models.layers.activation_checkpointing import checkpoint_layers
from ptp_lightning.models.layers.compile import compile_layers
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.stored_state import NGRAM_PROBABILITIES, NGRAM_TOKEN_IDS
from ptp_lightning.ngrams import count_ngrams
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.modules.training_module import TrainingModule
from ptp_lightning.training.optimization import OptimizerSettings, configure
from ptp_lightning.training.trainer_state import datamodule_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTED_TOKENS = 2**23
"""Of the training data, for the draft vocabulary and n-grams; what is frequent is known long before."""


class PredictorModule(TrainingModule):
    """A predictor in training.

    Args:
        predictor: the base model and everything that is trained.
        optimizer: optimiser and schedule.
        activation_checkpointing: store only the inputs of decoder layers and refiner, and recompute the rest in the
            backward pass: less memory, about a third more time.
        compile: `torch.compile` decoder layers in passes with gradients. It helps if a GPU waits for Python, with small
            models or short batches. Needs a C++ compiler and minutes at the start. Passes without gradients (contexts,
            validation, decoding) are not compiled.

    Attributes:
        val_summary: of the last validation or test; the callbacks show it.
        end_of_text: the token id that ends a text, if there is one; set by `setup`.
    """

    def __init__(
        self,
        predictor: PredictorConfig,
        optimizer: OptimizerSettings,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.strict_loading = False  # frozen weights are not in the checkpoint
        self.predictor = PredictorNetwork(predictor)
        self.val_summary: WindowSummary | None = None
        self._loaded_prefix_counts: list[int] | None = None
        self.end_of_text: int | None = None
        if compile:  # first, so that recomputed layers are compiled too
            compile_layers(self.decoder_layers("set model.init_args.compile to false"))
        if activation_checkpointing:
            layers = self.decoder_layers("set model.init_args.activation_checkpointing to false")
            refiner = self.predictor.refiner
            checkpoint_layers(layers if refiner is None else [*layers, *refiner.layers], self.predictor.gate)

    @property
    def networks(self) -> list[PreTrainedModel]:
        """The base model, and the student's copy of it where there is one."""
        copy = self.predictor.student_copy
        return [self.predictor.base_model] if copy is None else [self.predictor.base_model, copy]

    @property
    def reads_windows_from_rows(self) -> bool:
        """Whether windows hold tokens of the rows, so that a row must be at least as long as a window."""
        return True

    def setup(self, stage: str) -> None:
        """Check that data and model fit.

        Raises:
            ValueError: tokenizer, row length or window length do not fit, or another teacher wrote the completions.
        """
        data = datamodule_of(self.trainer)
        length, limit = self.predictor.config.window_length, self.predictor.max_positions
        if isinstance(data, CompletionsDataModule):
            require_own_completions(self.predictor, data.settings)
        require_known_tokens(self.predictor, data)
        if self.reads_windows_from_rows and length > data.row_length:
            raise ValueError(
                f"expected windows no longer than a row, found predictor.window_length {length} > data.row_length "
                f"{data.row_length}: lower predictor.window_length or raise data.row_length"
            )
        if limit is not None and data.row_length + length > limit:
            raise ValueError(
                f"expected data.row_length + predictor.window_length <= {limit} (the model's positions), found "
                f"{data.row_length} + {length}: lower data.row_length"
            )
        self.end_of_text = data.end_of_text

    def on_fit_start(self) -> None:
        """Count what the predictor reads from training data, unless a checkpoint brought it.

        Also silence Lightning's warning about the base model, which is in eval mode on purpose.

        Raises:
            ValueError: there are a draft vocabulary or n-grams, but the data are not text.
        """
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode", category=PossibleUserWarning)
        self._choose_draft_vocabulary()
        self._count_ngrams()

    def _choose_draft_vocabulary(self) -> None:
        head, size = self.predictor.draft_head, self.predictor.config.draft_vocabulary
        if head is not None and size is not None and not head.is_chosen:
            vocab_size = self.predictor.base_model.config.vocab_size
            self.predictor.choose_draft_vocabulary(most_frequent_tokens(self._counted_texts(), size, vocab_size))

    def _count_ngrams(self) -> None:
        table, size = self.predictor.slot_encoder.ngrams, self.predictor.config.ngrams
        if table is not None and size is not None and not table.is_set:
            table.set(count_ngrams(self._counted_texts(), size))

    def _counted_texts(self) -> Iterator[Sequence[int]]:
        return first_tokens(datamodule_of(self.trainer).training_texts(), COUNTED_TOKENS)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The configured optimiser and schedule for all trained weights."""
        return configure(
            self.optimizer_settings, self.predictor.named_parameters(), self.trainer.estimated_stepping_batches
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the trained weights only, with the predictor's configuration and base model."""
        checkpoint["state_dict"] = {
            f"predictor.{name}": value for name, value in self.predictor.trainable_state().items()
        }
        checkpoint["predictor"] = {
            "format_version": FORMAT_VERSION,
            "config": self.predictor.config.to_dict(),
            "base_fingerprint": self.predictor.base_fingerprint,
        }
        if self.val_summary is not None and self.val_summary.num_windows > 0:
            checkpoint["predictor"]["prefix_counts"] = self.val_summary.prefix_counts.tolist()
        elif self._loaded_prefix_counts is not None:  # resumed, and stopped before the next validation
            checkpoint["predictor"]["prefix_counts"] = self._loaded_prefix_counts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Migrate a checkpoint of an earlier version; refuse another base model, sampling settings or adapter.

        Raises:
            ValueError: what differs, and the key to set.
        """
        migrate_checkpoint(checkpoint, "the checkpoint")
        require_same_predictor(checkpoint, self.predictor)
        super().on_load_checkpoint(checkpoint)
        self._loaded_prefix_counts = checkpoint["predictor"].get("prefix_counts")
        state: dict[str, Tensor] = checkpoint["state_dict"]
        if self.predictor.slot_encoder.ngrams is not None:  # not trained, so a resumed run may begin to have them
            own = self.state_dict()
            for name in (NGRAM_TOKEN_IDS, NGRAM_PROBABILITIES):
                state.setdefault(f"predictor.{name}", own[f"predictor.{name}"])
        self.predictor.require_trainable_state({name.removeprefix("predictor."): state[name] for name in state})

    def _encode(self, batch: PackedBatch, sampling: SamplingConfig | None = None) -> Context:
        return self.predictor.encode(batch, sampling, self.end_of_text)

    def _log_summary(
        self, stage: str, summary: WindowSummary, more: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Store a summary for the callbacks; log its tags and further ones."""
        self.val_summary = summary
        tags = as_tags(summary, stage) | dict(more)
        headline = f"{stage}/correct_tokens"
        if headline in tags:  # there were windows
            # Equal on every rank; synchronised nevertheless, so that a checkpoint callback may monitor it.
            self.log(headline, tags.pop(headline), prog_bar=True, sync_dist=True)
        self.log_dict(tags, rank_zero_only=True)


def require_known_tokens(predictor: PredictorNetwork, data: PackedDataModule) -> None:
    """Refuse data with token ids that the base model does not have.

    Raises:
        ValueError: names both vocabulary sizes.
    """
    vocabulary = predictor.base_model.config.vocab_size
    if data.vocab_size > vocabulary:
        raise ValueError(
            f"expected data of at most {vocabulary} token ids (the model's vocab_size), found {data.vocab_size}: "
            "data.tokenizer must name the model of predictor.backbone.path (a series needs one more id than it has "
            "values)"
        )


def require_own_completions(predictor: PredictorNetwork, completions: CompletionSettings) -> None:
    """Refuse completions of another teacher, or of this one under other sampling settings.

    Without a frozen teacher completions are ordinary data, and nothing is refused.

    Raises:
        ValueError: what differs, and the keys to change.
    """
    config = predictor.config
    if config.student.trains_base:
        return
    vocabulary = predictor.base_model.config.vocab_size
    if completions.vocab_size != vocabulary:
        raise ValueError(
            f"expected completions of a teacher with {vocabulary} token ids (the model's vocab_size), found "
            f"{completions.vocab_size} ({completions.teacher_path}): set {FOLDER_KEY} or predictor.backbone.path"
        )
    if completions.teacher != predictor.base_fingerprint:
        raise ValueError(
            f"expected completions of the teacher {config.backbone.path} (fingerprint {predictor.base_fingerprint}), "
            f"found those of {completions.teacher_path} (fingerprint {completions.teacher}): set {FOLDER_KEY} or "
            "predictor.backbone.path"
        )
    if config.sampling_range is not None:
        raise ValueError(
            f"expected completions of every setting in predictor.sampling_range {config.sampling_range}, found those "
            f"of {completions.sampling} alone: set predictor.sampling_range to null, or set {FOLDER_KEY}"
        )
    if completions.sampling != config.sampling:
        raise ValueError(
            f"expected completions that were sampled with {config.sampling}, found {completions.sampling}: set "
            f"{FOLDER_KEY} or predictor.sampling"
        )
