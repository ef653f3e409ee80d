"""AutoregressiveModule: ordinary next-token training, for small teachers and autoregressive references."""

import math
import re
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from ptp_lightning.data.batch import PackedBatch
from ptp_lightning.models.backbone import BackboneSettings, load_backbone
from ptp_lightning.models.window_attention import context_mask
from ptp_lightning.training.optimization import OptimizerSettings, configure

IGNORED_LABEL = -100
SPECIAL_TOKEN = r"<\|\w+\|>"


def next_token_labels(batch: PackedBatch) -> Tensor:
    """`[B, S]` int64: the next token of the same document, or -100 where the document or the completion ends."""
    labels = batch.input_ids.roll(-1, dims=1)
    follows = (batch.document_ids == batch.document_ids.roll(-1, dims=1)) & batch.completion_mask.roll(-1, dims=1)
    follows[:, -1] = False  # rolled round to the row's own first token
    return labels.masked_fill(~follows, IGNORED_LABEL)


def token_byte_lengths(tokens: list[str]) -> Tensor:
    """`[V]` int64: bytes that each entry of a byte-level vocabulary stands for (its alphabet has a letter a byte).

    Special tokens (`<|endoftext|>`) stand for none.
    """
    return torch.tensor([0 if re.fullmatch(SPECIAL_TOKEN, token) else len(token) for token in tokens])


class AutoregressiveModule(LightningModule):
    """Train a causal LM with cross entropy on packed rows.

    Logs `train/loss_nats`, `val/loss_nats` (per token) and `val/bits_per_byte`. Checkpoints are ordinary Lightning
    checkpoints; `on_fit_end` also writes the model as a Hugging Face folder when `output` is given.

    Args:
        backbone: the network; `from_config` for a fresh one.
        optimizer: optimiser and schedule.
        output: folder for `save_pretrained` at the end of `fit` (weights in bfloat16, with the tokenizer).
        compile: run the network through `torch.compile`; needs a C++ compiler, starts slower, steps faster.
    """

    def __init__(
        self,
        backbone: BackboneSettings,
        optimizer: OptimizerSettings,
        output: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self.output = output
        self.model = load_backbone(backbone)
        self.model.requires_grad_(True).train()  # dropout included, where the network has any
        if compile:
            self.model.compile()

    def setup(self, stage: str) -> None:
        """Learn how many bytes each token stands for."""
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        vocab_size = self.model.config.vocab_size
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"expected a tokenizer of at most {vocab_size} entries (the model's vocab_size), found "
                f"{len(tokenizer)}: mend data.tokenizer or model.backbone"
            )
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.register_buffer("byte_lengths", token_byte_lengths(tokens).to(self.device), persistent=False)

    def _nats(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Sum of -log P over the labelled tokens, and the labels."""
        logits = self.model(
            input_ids=batch.input_ids,
            attention_mask=context_mask(batch.document_ids),
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        labels = next_token_labels(batch)
        nats = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return nats, labels

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Mean cross entropy in nats per token."""
        nats, labels = self._nats(batch)
        loss = nats / (labels != IGNORED_LABEL).sum()
        self.log("train/loss_nats", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add up nats, tokens and bytes."""
        nats, labels = self._nats(batch)
        real = labels != IGNORED_LABEL
        num_bytes = torch.as_tensor(self.byte_lengths)[labels.clamp_min(0)].mul(real).sum()
        self._sums += torch.stack([nats.double(), real.sum().double(), num_bytes.double()])

    def on_validation_epoch_end(self) -> None:
        """Log nats per token and bits per byte over all ranks."""
        self._log_sums("val")

    def on_test_epoch_start(self) -> None:
        """Start the sums."""
        self.on_validation_epoch_start()

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation, under `test/`."""
        self._log_sums("test")

    def _log_sums(self, stage: str) -> None:
        nats, tokens, num_bytes = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        # The same on every rank; synchronised all the same, so that a checkpoint callback may monitor them.
        self.log(f"{stage}/loss_nats", (nats / tokens).float(), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/bits_per_byte", (nats / math.log(2) / num_bytes).float(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The configured optimiser and schedule over all weights."""
        steps = self.trainer.estimated_stepping_batches
        return configure(self.optimizer_settings, self.model.named_parameters(), steps)

    def on_fit_end(self) -> None:
        """Write the Hugging Face folder, in bfloat16."""
        if self.output is None or not self.trainer.is_global_zero:
            return
        if self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        import copy

        small: Any = copy.deepcopy(self.model)
        small.to(torch.bfloat16).save_pretrained(self.output)
        self.trainer.datamodule.tokenizer.save_pretrained(self.output)  # type: ignore[attr-defined]
