"""The progress of `pregenerate`: a bar, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ptp_lightning.data.completions.completions import CompletionFolder, CompletionSettings
from ptp_lightning.utils.progress_lines import LinePacer, print_line


class ShardProgress:
    """The shards of all processes and the tokens of this process.

    Args:
        bar: of rich.
        settings: of the completions.
        title: of the bar, which begins each line.

    Attributes:
        num_tokens: sampled by this process.
        seconds: since the start.
    """

    def __init__(self, bar: Any, settings: CompletionSettings, title: str) -> None:
        self.num_tokens = 0
        self._bar = bar
        self._settings = settings
        self._title = title
        self._pacer = None if bar.console.is_terminal else LinePacer()
        self._finished = 0
        self._in_shard = 0
        self._begin = time.perf_counter()
        self._task: Any = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._begin

    def on_shards(self, num_finished: int) -> None:
        """See `ProgressListener.on_shards`."""
        self._finished, self._in_shard = num_finished, 0
        if self._task is None:  # earlier shards must not count for the speed
            self._task = self._bar.add_task("", total=self._settings.num_shards, completed=num_finished)
            if self._pacer is not None:
                self._pacer.start(num_finished / self._settings.num_shards)
        self._update()

    def on_tokens(self, num_tokens: int) -> None:
        """See `ProgressListener.on_tokens`."""
        self.num_tokens += num_tokens
        self._in_shard += num_tokens
        self._update()

    def _update(self) -> None:
        settings = self._settings
        tokens_per_shard = settings.shard_prompts * settings.num_completions * settings.max_new_tokens
        completed = min(self._finished + self._in_shard / tokens_per_shard, settings.num_shards)
        speed = f"{self.num_tokens / self.seconds:,.0f} tokens/s"
        self._bar.update(self._task, completed=completed, description=speed)
        fraction = completed / settings.num_shards
        if self._pacer is not None and self._pacer.is_due(fraction):
            shards = f"{self._title} {completed:.1f}/{settings.num_shards} ({fraction:.0%})"
            print_line(shards, speed, self._pacer.time_left(fraction))


@contextmanager
def progress_bar(folder: CompletionFolder, title: str) -> Iterator[ShardProgress]:
    """Show the shards of a folder and the tokens per second of this process."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield ShardProgress(bar, folder.settings, title)
