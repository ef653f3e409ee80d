"""AutoregressiveModule: ordinary next-token training, for small teachers and autoregressive references."""

import copy
import math
import re
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import LossSum
from ptp_lightning.metrics import PositionMeans
from ptp_lightning.models.attention.masks import context_mask
from ptp_lightning.models.attention.sliding_window import layer_masks
from ptp_lightning.models.backbone import BackboneSettings, load_backbone, random_model
from ptp_lightning.models.layers.activation_checkpointing import checkpoint_layers
from ptp_lightning.models.lora.gate import Gate
from ptp_lightning.models.positions import max_positions
from ptp_lightning.models.support import require_packed_rows
from ptp_lightning.training.modules.training_module import TrainingModule
from ptp_lightning.training.optimization import OptimizerSettings, configure
from ptp_lightning.training.trainer_state import datamodule_of
from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.pretrained import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED_LABEL = -100
SPECIAL_TOKEN = r"<\|\w+\|>"


def next_token_labels(batch: PackedBatch) -> Tensor:
    """`[B, S]` int64: the next token of the same document, or -100 where the document or the completion ends."""
    labels = batch.input_ids.roll(-1, dims=1)
    follows = (batch.document_ids == batch.document_ids.roll(-1, dims=1)) & batch.completion_mask.roll(-1, dims=1)
    follows[:, -1] = False  # `roll` wraps around to the first token of the row
    return labels.masked_fill(~follows, IGNORED_LABEL)


def token_byte_lengths(tokens: list[str]) -> Tensor:
    """`[V]` int64: bytes in each token of a byte-level vocabulary, whose alphabet has one letter per byte.

    Special tokens (`<|endoftext|>`) count as no byte.

    >>> token_byte_lengths(["def", "Ġx", "<|endoftext|>"])  # Ġ is the letter of a space
    tensor([3, 2, 0])
    """
    return torch.tensor([0 if re.fullmatch(SPECIAL_TOKEN, token) else len(token) for token in tokens])


class AutoregressiveModule(TrainingModule):
    """Train a causal LM with cross entropy on packed rows.

    Logs `train/loss_nats` and `val/loss_nats` (per token), `val/bits_per_byte` if the data have a tokenizer and
    `val/perplexity` if not. Checkpoints are ordinary Lightning checkpoints; `on_fit_end` also writes the model as a
    Hugging Face folder if `output` is given.

    Args:
        backbone: the network; `from_config` for a fresh one.
        optimizer: optimiser and schedule.
        output: folder for `save_pretrained` at the end of `fit` (with the tokenizer, if there is one).
        compile: run the network through `torch.compile`; needs a C++ compiler, starts slower, steps faster.
        output_dtype: number format of the weights in `output`.
        perplexity_positions: number of positions with a logged `val/perplexity/position_XX`, counted from the second
            token of each document, which is where its first window can start.
        activation_checkpointing: recompute decoder layers in the backward pass: less memory, more time.

    Raises:
        ValueError: the network does not read the documents of a packed row as each on its own; recurrent ones do not.
    """

    def __init__(
        self,
        backbone: BackboneSettings,
        optimizer: OptimizerSettings,
        output: str | None = None,
        compile: bool = False,
        output_dtype: Literal["float32", "bfloat16"] = "bfloat16",
        perplexity_positions: int = 0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer)
        if perplexity_positions < 0:
            raise ValueError(f"expected model.init_args.perplexity_positions >= 0, found {perplexity_positions}")
        self.output = None if output is None else str(local_path(output, "model.init_args.output", WRITTEN))
        self.output_dtype = output_dtype
        self.perplexity = PositionMeans(perplexity_positions) if perplexity_positions else None
        self.model = load_backbone(backbone).eval()
        require_packed_rows(self.model)
        self.model.requires_grad_(True).train()  # with dropout, if the network has any
        if activation_checkpointing:
            checkpoint_layers(self.decoder_layers("set model.init_args.activation_checkpointing to false"), Gate())
        if compile:
            self.model.compile()

    @property
    def networks(self) -> "list[PreTrainedModel]":
        """The network that is trained."""
        return [self.model]

    def setup(self, stage: str) -> None:
        """Check that data and model fit; count the bytes of each token.

        Raises:
            ValueError: the data have more token ids, or longer rows, than the model takes.
        """
        data = datamodule_of(self.trainer)
        vocab_size = self.model.config.vocab_size
        if data.vocab_size > vocab_size:
            raise ValueError(
                f"expected data of at most {vocab_size} token ids (the model's vocab_size), found {data.vocab_size}: "
                "set data.tokenizer or model.backbone (a series needs one more id than it has values)"
            )
        limit = max_positions(self.model.config)
        if limit is not None and data.row_length > limit:
            raise ValueError(
                f"expected data.row_length <= {limit} (the model's positions), found {data.row_length}: lower "
                "data.row_length"
            )
        self.has_bytes = data.tokenizer is not None
        byte_lengths = torch.zeros(vocab_size, dtype=torch.int64)
        if data.tokenizer is not None:
            byte_lengths = token_byte_lengths(data.tokenizer.convert_ids_to_tokens(list(range(data.vocab_size))))
        self.register_buffer("byte_lengths", byte_lengths.to(self.device), persistent=False)

    def _nats(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """`[B, S]` each: -log P of the labels, 0 where there is no label; and the labels."""
        logits = self.model(
            input_ids=batch.input_ids,
            attention_mask=layer_masks(self.model.config, context_mask(batch.document_ids)),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        labels = next_token_labels(batch)
        nats = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        return nats.view_as(labels), labels

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Mean cross entropy in nats per token, normalised by the tokens of all ranks."""
        nats, labels = self._nats(batch)
        total = nats.sum()
        loss = total / self._mean_counts(batch, LossSum(total, (labels != IGNORED_LABEL).sum())).squeeze()
        self.log("train/loss_nats", loss, prog_bar=True)
        return loss * self._share_of_step()

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Sum nats, tokens and bytes."""
        nats, labels = self._nats(batch)
        real = labels != IGNORED_LABEL
        num_bytes = torch.as_tensor(self.byte_lengths)[labels.clamp_min(0)].mul(real).sum()
        self._sums += torch.stack([nats.double().sum(), real.sum().double(), num_bytes.double()])
        if self.perplexity is not None:
            self.perplexity.update(nats[real], batch.position_ids[real])

    def on_validation_epoch_end(self) -> None:
        """Log nats per token and the derived metrics, over all ranks."""
        self._log_sums("val")

    def on_test_epoch_start(self) -> None:
        """Reset the sums."""
        self.on_validation_epoch_start()

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation, under `test/`."""
        self._log_sums("test")

    def _log_sums(self, stage: str) -> None:
        nats, tokens, num_bytes = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        # Equal on every rank; synchronised nevertheless, so that a checkpoint callback may monitor them.
        self.log(f"{stage}/loss_nats", (nats / tokens).float(), prog_bar=True, sync_dist=True)
        if self.has_bytes:
            self.log(f"{stage}/bits_per_byte", (nats / math.log(2) / num_bytes).float(), prog_bar=True, sync_dist=True)
        else:
            self.log(f"{stage}/perplexity", (nats / tokens).exp().float(), prog_bar=True, sync_dist=True)
        if self.perplexity is not None:
            means = self.perplexity.compute()
            self.perplexity.reset()
            tags = {f"{stage}/perplexity/position_{j:02d}": math.exp(mean) for j, mean in means.items()}
            self.log_dict(tags, rank_zero_only=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The configured optimiser and schedule over all weights."""
        steps = self.trainer.estimated_stepping_batches
        return configure(self.optimizer_settings, self.model.named_parameters(), steps)

    def on_fit_end(self) -> None:
        """Write the Hugging Face folder."""
        if self.output is None or self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        # Sharded weights are gathered one by one, which is a collective operation.
        state = {name: _gathered(value).cpu() for name, value in self.model.state_dict().items()}
        if not self.trainer.is_global_zero:
            return
        written = random_model(copy.deepcopy(self.model.config), getattr(torch, self.output_dtype))
        written.generation_config = copy.deepcopy(self.model.generation_config)
        written.load_state_dict(state)
        with quiet_transformers(progress_bar=False):
            written.save_pretrained(self.output)
        tokenizer = datamodule_of(self.trainer).tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(self.output)


def _gathered(value: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; a collective operation."""
    return value.full_tensor() if isinstance(value, DTensor) else value
