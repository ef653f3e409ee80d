"""Folders of completions: read what was written; errors name the file that is invalid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptp_lightning.data.completions.completions import (
    CompletionFolder,
    CompletionSettings,
    RaggedIds,
    prompts_fingerprint,
)
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_completions import PROMPTS, synthetic_completions, tiny_settings, write_synthetic


class TestSettings:
    def test_shards_are_fixed_ranges_of_prompts(self) -> None:
        settings = tiny_settings()
        assert [list(settings.prompts_of(shard)) for shard in range(settings.num_shards)] == [
            list(range(0, 8)),
            list(range(8, 16)),
            [16, 17, 18, 19],
        ]

    def test_every_completion_has_a_different_seed(self) -> None:
        settings, other = tiny_settings(), tiny_settings(seed=4)
        seeds = [each.seed_of(p, c) for each in (settings, other) for p in range(20) for c in range(20)]
        assert len(set(seeds)) == len(seeds)
        assert settings.seed_of(2, 1) == tiny_settings(max_new_tokens=9, num_prompts=5, shard_prompts=1).seed_of(2, 1)
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_json_and_back(self) -> None:
        settings = tiny_settings(sampling=SamplingConfig(0.5, None, 0.8, "descending"), end_of_text=None)
        assert CompletionSettings.from_json(settings.to_json().decode()) == settings

    def test_the_fingerprint_distinguishes_prompts(self) -> None:
        prompts = ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[3], [1, 2]])
        assert len({prompts_fingerprint(each) for each in prompts}) == 4


class TestReading:
    def test_what_was_written(self, tmp_path: Path) -> None:
        write_synthetic(tmp_path)
        folder = CompletionFolder.open(tmp_path)
        table = folder.read()
        assert table.prompts.tolist() == [prompt for prompt in range(20) for _ in range(2)]
        for row, (prompt, number) in enumerate((prompt, number) for prompt in range(20) for number in range(2)):
            assert table.prompt_ids.of(row) == PROMPTS[prompt]
            assert table.completion_ids.of(row) == [prompt, number] * 2
        num_tokens, num_bytes = folder.sizes()
        assert num_tokens == 20 * 2 * 4
        assert num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))

    def test_seeds_are_stored(self, tmp_path: Path) -> None:
        settings = write_synthetic(tmp_path).settings
        rows = pq.ParquetFile(tmp_path / "shard-00001.parquet").read().to_pylist()
        assert [row["seed"] for row in rows] == [settings.seed_of(p, c) for p in range(8, 16) for c in range(2)]

    def test_only_existing_shards_are_read(self, tmp_path: Path) -> None:
        folder = write_synthetic(tmp_path, shards=[2, 0])
        assert folder.missing_shards() == [1]
        assert sorted(set(folder.read().prompts.tolist())) == [*range(0, 8), *range(16, 20)]

    def test_same_content_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_synthetic(tmp_path / name)
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    @given(st.lists(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1), min_size=1))
    def test_joined(self, shards: list[list[list[int]]]) -> None:
        def ragged(sequences: list[list[int]]) -> RaggedIds:
            values = np.array([token for sequence in sequences for token in sequence], dtype=np.int32)
            return RaggedIds(values, np.cumsum([0, *map(len, sequences)]))

        joined = RaggedIds.joined([ragged(shard) for shard in shards])
        sequences = [sequence for shard in shards for sequence in shard]
        assert [joined.of(row) for row in range(len(sequences))] == sequences
        assert joined.lengths.tolist() == [len(sequence) for sequence in sequences]


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"max_new_tokens": 7}, "max_new_tokens 6, found 7"),
            ({"seed": 4}, "seed 3, found 4"),
            ({"teacher": "abd"}, "teacher abc, found abd"),
            ({"teacher_dtype": "bfloat16"}, "teacher_dtype float32, found bfloat16"),
            ({"sampling": SamplingConfig(temperature=0.8, top_k=8, top_p=0.9)}, "temperature=0.7.*found.*=0.8"),
            ({"num_prompts": 5}, "num_prompts 20, found 5"),
            ({"prompts": prompts_fingerprint(PROMPTS[::-1])}, "prompts .*, found "),
            ({"num_completions": 3, "shard_prompts": 4}, "num_completions 2, found 3; shard_prompts 8, found 4"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_another_run_in_the_same_folder(self, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
        write_synthetic(tmp_path, shards=[])
        with pytest.raises(ValueError, match=f"created: .*{expected}.*--output"):
            CompletionFolder.create(tmp_path, tiny_settings(**changes))

    def test_the_same_teacher_at_another_path_continues(self, tmp_path: Path) -> None:
        write_synthetic(tmp_path, shards=[1])
        moved = tiny_settings(teacher_path="/moved", tokenizer="/moved")
        assert CompletionFolder.create(tmp_path, moved).missing_shards() == [0, 2]

    def test_shards_without_settings(self, tmp_path: Path) -> None:
        write_synthetic(tmp_path)
        (tmp_path / "completions.json").unlink()
        with pytest.raises(ValueError, match="expected completions.json .*--output"):
            CompletionFolder.create(tmp_path, tiny_settings())
        with pytest.raises(FileNotFoundError, match="expected completions.json .*data.folder"):
            CompletionFolder.open(tmp_path)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="pregenerate.*nowhere, found none: set data.folder"):
            CompletionFolder.open(tmp_path / "nowhere")
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="found a file: choose another --output"):
            CompletionFolder.create(tmp_path / "file", tiny_settings())

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1}'])
    def test_an_invalid_settings_file(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "completions.json").write_text(text)
        with pytest.raises(ValueError, match="data.folder=.*completions.json cannot be read"):
            CompletionFolder.open(tmp_path)

    def test_no_shards(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="expected shards .*found completions.json: set data.folder"):
            write_synthetic(tmp_path, shards=[]).read()

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all"])
    def test_an_empty_or_invalid_shard(self, tmp_path: Path, content: bytes) -> None:
        folder = write_synthetic(tmp_path)
        folder.shard_path(1).write_bytes(content)
        with pytest.raises(ValueError, match="data.folder=.*shard-00001.parquet cannot be read"):
            folder.read()

    def rewrite_first_shard(self, path: Path, **columns: Any) -> CompletionFolder:
        """A folder whose first shard has other columns; None removes one."""
        folder = write_synthetic(path)
        table = pq.ParquetFile(folder.shard_path(0)).read()
        for name, values in columns.items():
            index = table.schema.get_field_index(name)
            table = table.remove_column(index) if values is None else table.set_column(index, name, values)
        pq.write_table(table, folder.shard_path(0))
        return folder

    def test_a_missing_column(self, tmp_path: Path) -> None:
        expected = "expected a column completion_ids .*shard-00000.*found completion .*prompt_ids.*data.folder"
        with pytest.raises(ValueError, match=expected):
            self.rewrite_first_shard(tmp_path, completion_ids=None).read()

    def test_a_column_of_another_type(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a column completion_ids \(list<.*found.*\(string\)"):
            self.rewrite_first_shard(tmp_path, completion_ids=pa.array(["text"] * 16)).read()

    @pytest.mark.parametrize("token", [-1, 32, 2048])
    def test_tokens_outside_the_vocabulary(self, tmp_path: Path, token: int) -> None:
        ids = pa.array([[1, token]] * 16, pa.list_(pa.int32()))
        with pytest.raises(ValueError, match=rf"0 .. 31 in completion_ids of .*shard-00000.*, found {token}: set"):
            self.rewrite_first_shard(tmp_path, completion_ids=ids).read()

    @pytest.mark.parametrize("entry", [[], None])
    def test_a_completion_without_tokens(self, tmp_path: Path, entry: list[int] | None) -> None:
        ids = pa.array([[1, 2]] * 15 + [entry], pa.list_(pa.int32()))
        with pytest.raises(ValueError, match=r"at least one token in each completion_ids of .*shard-00000"):
            self.rewrite_first_shard(tmp_path, completion_ids=ids).read()

    def test_rows_that_are_missing_or_repeated(self, tmp_path: Path) -> None:
        folder = write_synthetic(tmp_path)
        rows = synthetic_completions(folder.settings, 0)
        for wrong in (rows[:-1], [*rows[:-1], rows[0]], synthetic_completions(folder.settings, 1)):
            folder.write_shard(0, wrong)
            with pytest.raises(ValueError, match="expected 2 completions of each of the prompts 0 to 7 in"):
                folder.read()

    def test_an_unknown_setting(self, tmp_path: Path) -> None:
        plain = json.loads(tiny_settings().to_json()) | {"colour": "red"}
        with pytest.raises(ValueError, match="expected the entries .*found .*colour"):
            CompletionSettings.from_json(json.dumps(plain))
