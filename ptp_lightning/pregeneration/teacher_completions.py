"""Sampling of completions with the base model, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Protocol

from ptp_lightning.data.completions.completions import Completion, CompletionFolder, CompletionSettings
from ptp_lightning.decoding.autoregressive import decode_autoregressively
from ptp_lightning.decoding.generation import GenerationSettings, OnTokens
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.utils.atomic_files import remove_unfinished
from ptp_lightning.utils.file_lock import FileLock, remove_locks

POLL_SECONDS = 1.0  # while other processes work on the remaining shards


def generation_settings(
    settings: CompletionSettings, keys: Sequence[tuple[int, int]], *, greedy: bool = False
) -> GenerationSettings:
    """Decoder settings for these pairs of (prompt number, completion number), all of them greedy or none."""
    return GenerationSettings(
        sampling=replace(settings.sampling, temperature=0.0) if greedy else settings.sampling,
        max_new_tokens=settings.max_new_tokens,
        seed=tuple(settings.seed_of(*key) for key in keys),
        end_of_text=frozenset(settings.ending_ids),
    )


def sample_shard(
    predictor: PredictorNetwork,
    settings: CompletionSettings,
    prompts: Sequence[Sequence[int]],
    shard: int,
    batch_size: int,
    on_tokens: OnTokens | None = None,
) -> list[Completion]:
    """Sample all completions of a shard with the autoregressive decoder.

    Args:
        predictor: whose base model is the teacher; in eval mode.
        settings: of the completions.
        prompts: token ids of all P prompts.
        shard: number of the shard.
        batch_size: completions generated in parallel; has no effect on them.
        on_tokens: see `decode_autoregressively`; row numbers are within a batch.
    """
    keys = list(product(settings.prompts_of(shard), range(settings.num_completions)))
    token_ids: dict[tuple[int, int], list[int]] = {}
    for greedy in (False, True):  # a batch has one temperature
        alike = [key for key in keys if settings.is_greedy(*key) == greedy]
        for begin in range(0, len(alike), batch_size):
            batch = alike[begin : begin + batch_size]
            generation = generation_settings(settings, batch, greedy=greedy)
            texts = decode_autoregressively(predictor, [prompts[prompt] for prompt, _ in batch], generation, on_tokens)
            token_ids |= {key: text.token_ids for key, text in zip(batch, texts, strict=True)}
    return [Completion(*key, settings.seed_of(*key), list(prompts[key[0]]), token_ids[key]) for key in keys]


class SampleShard(Protocol):
    """Returns the completions of a shard, and reports new tokens."""

    def __call__(self, shard: int, on_tokens: OnTokens) -> list[Completion]: ...


class ProgressListener(Protocol):
    """Receives the progress of `complete_folder`."""

    def on_shards(self, num_finished: int) -> None:
        """Number of shards finished by all processes."""
        ...

    def on_tokens(self, num_tokens: int) -> None:
        """Number of new tokens of this process."""
        ...


def complete_folder(folder: CompletionFolder, sample: SampleShard, listener: ProgressListener) -> None:
    """Write the missing shards of a folder, together with other processes; returns when all shards exist.

    Raises:
        OSError: the folder cannot be written to; finished shards are kept.
    """
    num_shards = folder.settings.num_shards
    while missing := folder.missing_shards():
        listener.on_shards(num_shards - len(missing))
        if not any(_complete_shard(folder, shard, sample, listener) for shard in missing):
            time.sleep(POLL_SECONDS)  # other processes work on the rest, and may be killed
    listener.on_shards(num_shards)
    remove_locks(folder.path)
    remove_unfinished(folder.path)


def _complete_shard(folder: CompletionFolder, shard: int, sample: SampleShard, listener: ProgressListener) -> bool:
    """Write a shard; returns False if it exists or another process works on it."""
    path = folder.shard_path(shard)
    if path.is_file():
        return False
    lock = FileLock.try_acquire(path)
    if lock is None:
        return False

    def on_tokens(_: int, token_ids: list[int]) -> None:
        lock.refresh()
        listener.on_tokens(len(token_ids))

    try:
        if path.is_file():  # finished before the lock was acquired
            return False
        folder.write_shard(shard, sample(shard, on_tokens))
        return True
    finally:
        lock.release()
