"""RunText: the command of a run, its results, and a sample of the trained predictor, as text."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.decoding.text import generate
from ptp_lightning.generation.call_marks import LEGEND, mark_cycles, plain_marks
from ptp_lightning.metrics import WindowSummary, as_tags
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.trainer_state import datamodule_of, tensorboard_loggers, val_summary
from ptp_lightning.utils.passwords import without_passwords

COMMAND_TAG = "run/command"
RESULTS_TAG = "run/results"
SAMPLE_TAG = "run/sample"
PROMPT_TOKENS = 24  # of a document without a prompt
LONGEST_PROMPT = 256


class RunText(Callback):
    """TensorBoard's text tab: the command of the run, and at its end a table of the last validation and a sample.

    The sample continues the first validation document by the trained predictor; marks show what each cycle of calls
    wrote, as `generate --show_calls` does. There is none without a tokenizer, or with sharded weights.

    Args:
        sample_tokens: length of the sample; 0 for none.

    Raises:
        ValueError: it is negative.
    """

    def __init__(self, sample_tokens: int = 48) -> None:
        if sample_tokens < 0:
            raise ValueError(f"expected sample_tokens >= 0, found {sample_tokens}")
        self.sample_tokens = sample_tokens
        self._prompt: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the command."""
        self._prompt = []
        command = without_passwords(shlex.join(["python", *sys.orig_argv[1:]]))
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_text(COMMAND_TAG, f"```\n{command}\n```", global_step=trainer.global_step)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the prompt from the first batch."""
        if not self._prompt and isinstance(batch, PackedBatch):
            self._prompt = prompt_of(batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the sample."""
        loggers = tensorboard_loggers(trainer)
        summary = val_summary(trainer, pl_module)
        if not loggers or summary is None or summary.num_windows == 0:
            return
        texts = {RESULTS_TAG: markdown_table(summary)}
        sample = self._sample(trainer, pl_module)
        if sample is not None:
            texts[SAMPLE_TAG] = sample
        for logger in loggers:
            for tag, text in texts.items():
                logger.experiment.add_text(tag, text, global_step=trainer.global_step)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        predictor: object = getattr(pl_module, "predictor", None)
        data: object = datamodule_of(trainer)
        tokenizer = data.tokenizer if isinstance(data, PackedDataModule) else None
        # The other processes take no part in decoding, so each needs all weights.
        has_all_weights = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if tokenizer is None or not isinstance(predictor, PredictorNetwork) or not has_all_weights:
            return None
        limit = predictor.max_positions
        length = self.sample_tokens if limit is None else min(self.sample_tokens, limit - len(self._prompt))
        if length < 1 or not self._prompt:
            return None
        generation = generate(predictor, self._prompt, max_new_tokens=length, tokenizer=tokenizer)
        marks = plain_marks(mark_cycles(generation, self._prompt, tokenizer))
        cost = f"{generation.num_tokens} tokens in {generation.num_calls} calls; {LEGEND}"
        return f"{cost}\n\n{as_code(f'{generation.prompt}|{marks}')}"


def prompt_of(batch: PackedBatch) -> list[int]:
    """The prompt of the first document of a batch; its first tokens if it has none, or a very long one.

    >>> import torch
    >>> ids, learned = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[False, False, True, True]])
    >>> prompt_of(PackedBatch(ids, torch.tensor([[0, 0, 0, 1]]), ids, ids, learned))
    [4, 5]
    """
    first = batch.document_ids[0] == batch.document_ids[0, 0]
    token_ids, is_learned = batch.input_ids[0][first], batch.completion_mask[0][first]
    before = _num_before_first(is_learned)
    return token_ids[: before if 0 < before <= LONGEST_PROMPT else PROMPT_TOKENS].tolist()


def _num_before_first(mask: Tensor) -> int:
    """Index of the first true element; the length without one."""
    found = mask.nonzero()
    return int(found[0]) if len(found) else len(mask)


def as_code(text: str) -> str:
    """A block of code in Markdown, whatever the text contains."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def markdown_table(summary: WindowSummary) -> str:
    """Correct tokens, and a row for each position; "-" where there are no data."""
    tags = as_tags(summary)
    names = ("accuracy", "accuracy_given_prefix", "perplexity")
    rows = ["| position | accuracy | given a correct prefix | perplexity |", "|---:|---:|---:|---:|"]
    for position in range(summary.prefix_counts.numel() - 1):
        values = [tags.get(f"val/{name}/position_{position:02d}") for name in names]
        rows.append(f"| {position} | {' | '.join('-' if value is None else f'{value:.3f}' for value in values)} |")
    headline = (
        f"**{float(summary.correct_tokens):.3f}** correct tokens of a window in {int(summary.num_windows)} windows"
    )
    return "\n".join([headline, "", *rows])
