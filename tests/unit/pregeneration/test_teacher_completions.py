"""Sampled completions are the autoregressive decoder's texts, for any batch size and division of the work."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ptp_lightning.data.completions.completions import Completion, CompletionFolder
from ptp_lightning.decoding import GenerationSettings, decode_autoregressively
from ptp_lightning.decoding.generation import OnTokens
from ptp_lightning.pregeneration import teacher_completions
from ptp_lightning.pregeneration.teacher_completions import complete_folder, sample_shard
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.file_lock import FileLock, LockOwner
from tests.helpers.tiny_completions import PROMPTS, settings_of, synthetic_completions, tiny_settings
from tests.helpers.tiny_predictors import tiny_predictor

SAMPLING = SamplingConfig(temperature=1.5, top_k=20, top_p=0.95)
PREDICTOR = tiny_predictor(sampling=SAMPLING)
ENDS = tuple(range(20, 28))  # so many that some texts end early


class TestSampling:
    def test_every_completion_is_the_autoregressive_decoders(self) -> None:
        settings = settings_of(PREDICTOR, ending_ids=ENDS)
        completions = [
            c for shard in range(settings.num_shards) for c in sample_shard(PREDICTOR, settings, PROMPTS, shard, 7)
        ]
        assert [(c.prompt, c.completion) for c in completions] == [(p, n) for p in range(20) for n in range(2)]
        for found in completions:
            alone = GenerationSettings(
                sampling=SAMPLING, max_new_tokens=6, seed=found.seed, end_of_text=frozenset(ENDS)
            )
            (expected,) = decode_autoregressively(PREDICTOR, [PROMPTS[found.prompt]], alone)
            assert found.completion_ids == expected.token_ids
            assert found.prompt_ids == PROMPTS[found.prompt]
        lengths = {len(found.completion_ids) for found in completions}
        assert min(lengths) < 6 and max(lengths) == 6
        texts = {tuple(found.completion_ids) for found in completions}
        assert len(texts) > 30  # completions of a prompt are not copies of each other

    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_the_batch_size_has_no_effect(self, batch_size: int) -> None:
        settings = settings_of(PREDICTOR, ending_ids=ENDS)
        assert sample_shard(PREDICTOR, settings, PROMPTS, 1, batch_size) == sample_shard(
            PREDICTOR, settings, PROMPTS, 1, 7
        )

    def test_shards_and_other_completions_have_no_effect(self) -> None:
        few = sample_shard(PREDICTOR, settings_of(PREDICTOR), PROMPTS, 0, 7)
        settings = settings_of(PREDICTOR, num_completions=3, shard_prompts=4)
        more = [c for shard in (0, 1) for c in sample_shard(PREDICTOR, settings, PROMPTS, shard, 7)]
        assert [c for c in more if c.completion < 2] == few

    def test_another_seed_other_texts(self) -> None:
        first, second = (sample_shard(PREDICTOR, settings_of(PREDICTOR, seed=seed), PROMPTS, 0, 7) for seed in (0, 1))
        assert sum(a.completion_ids == b.completion_ids for a, b in zip(first, second, strict=True)) < 4


class RecordingListener:
    def __init__(self) -> None:
        self.num_finished: list[int] = []
        self.num_tokens = 0

    def on_shards(self, num_finished: int) -> None:
        self.num_finished.append(num_finished)

    def on_tokens(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens


class TestCompleteFolder:
    def create(self, path: Path) -> CompletionFolder:
        self.sampled: list[int] = []
        return CompletionFolder.create(path, tiny_settings())

    def sample(self, shard: int, on_tokens: OnTokens) -> list[Completion]:
        self.sampled.append(shard)
        on_tokens(0, [1, 2, 3])
        return synthetic_completions(tiny_settings(), shard)

    def test_only_missing_shards_are_sampled(self, tmp_path: Path) -> None:
        folder, listener = self.create(tmp_path), RecordingListener()
        folder.write_shard(1, synthetic_completions(folder.settings, 1))
        complete_folder(folder, self.sample, listener)
        assert self.sampled == [0, 2]
        assert (listener.num_finished, listener.num_tokens) == ([1, 2, 3], 6)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"completions.json", *(f"shard-0000{shard}.parquet" for shard in range(3))}
        complete_folder(folder, self.sample, listener)
        assert self.sampled == [0, 2]

    def test_shards_locked_by_others_are_sampled_when_they_die(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = self.create(tmp_path)
        lock = folder.shard_path(0).with_suffix(".lock")
        lock.write_text(json.dumps(asdict(LockOwner.current())))
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:  # the process id was reused by another process
                lock.write_text(json.dumps(asdict(replace(LockOwner.current(), started=0.0))))

        monkeypatch.setattr(teacher_completions.time, "sleep", sleep)
        complete_folder(folder, self.sample, RecordingListener())
        assert self.sampled == [1, 2, 0]
        assert len(waits) == 3

    def test_a_full_disk_releases_the_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = self.create(tmp_path)

        def full(shard: int, completions: list[Completion]) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(folder, "write_shard", full)
        with pytest.raises(OSError, match="No space left"):
            complete_folder(folder, self.sample, RecordingListener())
        assert [path.name for path in tmp_path.iterdir()] == ["completions.json"]
        assert FileLock.try_acquire(folder.shard_path(0)) is not None
