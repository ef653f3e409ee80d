"""Completions from the teacher: what the base model writes after prompts, shard by shard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from typing import Protocol

from ptp_lightning.data.completions.completions import Completion, CompletionFolder, CompletionSettings
from ptp_lightning.decoding.autoregressive import decode_autoregressively
from ptp_lightning.decoding.generation import GenerationSettings, OnTokens
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.utils.atomic_files import remove_unfinished
from ptp_lightning.utils.file_lock import FileLock, remove_locks

WAIT_SECONDS = 1.0  # between looks at what other processes are doing


def generation_settings(settings: CompletionSettings, keys: Sequence[tuple[int, int]]) -> GenerationSettings:
    """What the decoder is to do for these (prompt, completion)."""
    return GenerationSettings(
        sampling=settings.sampling,
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
    """All completions of a shard, by the autoregressive decoder.

    Args:
        predictor: whose base model writes; in eval mode.
        settings: how.
        prompts: all P of them, by number.
        shard: its number.
        batch_size: completions side by side; has no influence on what they are.
        on_tokens: see `decode_autoregressively`; rows are counted within a batch.
    """
    keys = list(product(settings.prompts_of(shard), range(settings.num_completions)))
    completions: list[Completion] = []
    for begin in range(0, len(keys), batch_size):
        batch = keys[begin : begin + batch_size]
        generation = generation_settings(settings, batch)
        texts = decode_autoregressively(predictor, [prompts[prompt] for prompt, _ in batch], generation, on_tokens)
        completions += [
            Completion(prompt, completion, settings.seed_of(prompt, completion), list(prompts[prompt]), text.token_ids)
            for (prompt, completion), text in zip(batch, texts, strict=True)
        ]
    return completions


class Make(Protocol):
    """Gives the completions of a shard, and tells of every new token on the way."""

    def __call__(self, shard: int, on_tokens: OnTokens) -> list[Completion]: ...


class Watcher(Protocol):
    """Sees how the work goes on."""

    def look(self, num_finished: int) -> None:
        """So many shards are finished, by all processes."""
        ...

    def count(self, num_tokens: int) -> None:
        """So many tokens more, by this process."""
        ...


def finish(folder: CompletionFolder, make: Make, watcher: Watcher) -> None:
    """Make what is missing in a folder, together with all processes that do the same; returns when nothing is.

    Raises:
        OSError: the folder cannot be written to; finished shards stay.
    """
    num_shards = folder.settings.num_shards
    while missing := folder.missing():
        watcher.look(num_shards - len(missing))
        if not any(_make_one(folder, shard, make, watcher) for shard in missing):
            time.sleep(WAIT_SECONDS)  # others are at work on the rest, and may die over it
    watcher.look(num_shards)
    remove_locks(folder.path)
    remove_unfinished(folder.path)


def _make_one(folder: CompletionFolder, shard: int, make: Make, watcher: Watcher) -> bool:
    """Whether this process has made the shard; not if it is there or another process is at it."""
    path = folder.shard_path(shard)
    if path.is_file():
        return False
    lock = FileLock.try_acquire(path)
    if lock is None:
        return False

    def on_tokens(_: int, token_ids: list[int]) -> None:
        lock.refresh()
        watcher.count(len(token_ids))

    try:
        if path.is_file():  # finished between the two looks
            return False
        folder.write(shard, make(shard, on_tokens))
        return True
    finally:
        lock.release()
