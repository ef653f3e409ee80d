"""What the teacher writes, in whatever batches and by whomever: the autoregressive decoder's texts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ptp_lightning.data.completions.completions import Completion, CompletionFolder
from ptp_lightning.decoding import GenerationSettings, decode_autoregressively
from ptp_lightning.decoding.generation import OnTokens
from ptp_lightning.pregeneration import teacher_completions
from ptp_lightning.pregeneration.teacher_completions import finish, sample_shard
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.file_lock import FileLock, LockOwner
from tests.helpers.tiny_completions import PROMPTS, made_up, settings_of, tiny_settings
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
    def test_batches_do_not_matter(self, batch_size: int) -> None:
        settings = settings_of(PREDICTOR, ending_ids=ENDS)
        assert sample_shard(PREDICTOR, settings, PROMPTS, 1, batch_size) == sample_shard(
            PREDICTOR, settings, PROMPTS, 1, 7
        )

    def test_shards_and_other_completions_do_not_matter(self) -> None:
        few = sample_shard(PREDICTOR, settings_of(PREDICTOR), PROMPTS, 0, 7)
        settings = settings_of(PREDICTOR, num_completions=3, shard_prompts=4)
        more = [c for shard in (0, 1) for c in sample_shard(PREDICTOR, settings, PROMPTS, shard, 7)]
        assert [c for c in more if c.completion < 2] == few

    def test_another_seed_other_texts(self) -> None:
        first, second = (sample_shard(PREDICTOR, settings_of(PREDICTOR, seed=seed), PROMPTS, 0, 7) for seed in (0, 1))
        assert sum(a.completion_ids == b.completion_ids for a, b in zip(first, second, strict=True)) < 4


class Seen:
    def __init__(self) -> None:
        self.looks: list[int] = []
        self.num_tokens = 0

    def look(self, num_finished: int) -> None:
        self.looks.append(num_finished)

    def count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens


class TestFinishing:
    def begin(self, path: Path) -> CompletionFolder:
        self.made: list[int] = []
        return CompletionFolder.begin(path, tiny_settings())

    def make(self, shard: int, on_tokens: OnTokens) -> list[Completion]:
        self.made.append(shard)
        on_tokens(0, [1, 2, 3])
        return made_up(tiny_settings(), shard)

    def test_what_is_missing_is_made_once(self, tmp_path: Path) -> None:
        folder, seen = self.begin(tmp_path), Seen()
        folder.write(1, made_up(folder.settings, 1))
        finish(folder, self.make, seen)
        assert self.made == [0, 2]
        assert (seen.looks, seen.num_tokens) == ([1, 2, 3], 6)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"completions.json", *(f"shard-0000{shard}.parquet" for shard in range(3))}
        finish(folder, self.make, seen)
        assert self.made == [0, 2]

    def test_shards_of_others_are_left_to_them_until_they_die(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = self.begin(tmp_path)
        lock = folder.shard_path(0).with_suffix(".lock")
        lock.write_text(json.dumps(asdict(LockOwner.current())))
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:  # the number of the process now belongs to another
                lock.write_text(json.dumps(asdict(replace(LockOwner.current(), started=0.0))))

        monkeypatch.setattr(teacher_completions.time, "sleep", sleep)
        finish(folder, self.make, Seen())
        assert self.made == [1, 2, 0]
        assert len(waits) == 3

    def test_a_full_disk_gives_the_claim_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = self.begin(tmp_path)

        def full(shard: int, completions: list[Completion]) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(folder, "write", full)
        with pytest.raises(OSError, match="No space left"):
            finish(folder, self.make, Seen())
        assert [path.name for path in tmp_path.iterdir()] == ["completions.json"]
        assert FileLock.try_acquire(folder.shard_path(0)) is not None
