"""Folders of a few short completions, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptp_lightning.data.completions.completions import (
    Completion,
    CompletionFolder,
    CompletionSettings,
    prompts_fingerprint,
)
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.pregeneration.teacher_completions import sample_shard
from ptp_lightning.sampling import SamplingConfig

PROMPTS = [[10 + number % 20, 5, 6][: 1 + number % 3] for number in range(20)]
"""One to three tokens each. Prompts 9 and 16 are in the validation split, 5 and 19 in the test split."""
VAL_PROMPTS, TEST_PROMPTS = {9, 16}, {5, 19}


def tiny_settings(**changes: Any) -> CompletionSettings:
    """Three shards of at most eight prompts, two completions per prompt."""
    plain: dict[str, Any] = {
        "teacher": "abc",
        "teacher_path": "somewhere",
        "teacher_dtype": "float32",
        "sampling": SamplingConfig(temperature=0.7, top_k=8, top_p=0.9),
        "max_new_tokens": 6,
        "seed": 3,
        "num_prompts": len(PROMPTS),
        "num_completions": 2,
        "prompts": prompts_fingerprint(PROMPTS),
        "shard_prompts": 8,
        "vocab_size": 32,
        "end_of_text": 0,
        "ending_ids": (0,),
        "tokenizer": None,
    }
    return CompletionSettings(**(plain | changes))


def settings_of(predictor: PredictorNetwork, **changes: Any) -> CompletionSettings:
    """Settings for completions of this predictor's base model."""
    own = {
        "teacher": predictor.base_fingerprint,
        "sampling": predictor.config.sampling,
        "vocab_size": predictor.base_model.config.vocab_size,
    }
    return tiny_settings(**(own | changes))


def synthetic_completions(settings: CompletionSettings, shard: int) -> list[Completion]:
    """Completions whose tokens identify them: completion 1 of prompt 3 is 3 1 3 1."""
    return [
        Completion(prompt, number, settings.seed_of(prompt, number), PROMPTS[prompt], [prompt, number] * 2)
        for prompt in settings.prompts_of(shard)
        for number in range(settings.num_completions)
    ]


def write_synthetic(path: Path, shards: Sequence[int] | None = None, **changes: Any) -> CompletionFolder:
    """A folder of synthetic completions, by default with all shards."""
    folder = CompletionFolder.create(path, tiny_settings(**changes))
    for shard in folder.missing_shards() if shards is None else shards:
        folder.write_shard(shard, synthetic_completions(folder.settings, shard))
    return folder


def write_sampled(path: Path, predictor: PredictorNetwork, **changes: Any) -> CompletionFolder:
    """A folder of completions sampled from the predictor's base model."""
    folder = CompletionFolder.create(path, settings_of(predictor, **changes))
    for shard in folder.missing_shards():
        folder.write_shard(shard, sample_shard(predictor, folder.settings, PROMPTS, shard, batch_size=5))
    return folder
