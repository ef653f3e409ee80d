"""Row sources: every row once per epoch, resumable at any row, sharded over processes; errors name invalid rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.file_rows import JsonLines, TextRows
from ptp_lightning.data.streaming.hub_rows import HubRows
from ptp_lightning.data.streaming.row_source import BadRowError, RowSource
from ptp_lightning.testing import check_row_source


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


LINES = [["a0", "a1", "", "a2"], ["b0"], [], ["c0", "c1", "c2", "c3"]]


def texts(source: RowSource, shard: ShardSpec | None = None, key: str = "0") -> list[str]:
    return [source.parse(row)["text"] for row in source.rows(key, shard or ShardSpec())]


@pytest.fixture(params=["json lines", "compressed json lines", "text lines", "text files", "parquet", "hub json"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowSource:
    """Eight rows (with text files, four documents) of four files, one of which is empty."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every epoch of Parquet files
    paths: list[str] = []
    for number, lines in enumerate(LINES):
        path = tmp_path / f"{number}.jsonl"
        content = "".join(json.dumps({"text": line}) + "\n" if line else "\n" for line in lines)
        if request.param.startswith("text"):
            path, content = tmp_path / f"{number}.txt", "".join(f"{line}\n" for line in lines)
        if request.param == "compressed json lines":
            path = tmp_path / f"{number}.jsonl.gz"
            path.write_bytes(gzip.compress(content.encode()))
        else:
            path.write_text(content, encoding="utf-8")
        paths.append(str(path))
    match request.param:
        case "text lines":
            return TextRows(paths, per="line")
        case "text files":
            return TextRows([str(tmp_path)])
        case "parquet":
            from datasets import Dataset

            files = [str(tmp_path / f"{number}.parquet") for number in range(len(LINES))]
            for lines, file in zip(LINES, files, strict=True):
                if lines:
                    Dataset.from_dict({"text": [line for line in lines if line]}).to_parquet(file)
            return HubRows("parquet", data_files=[file for file in files if Path(file).exists()])
        case "hub json":
            return HubRows("json", data_files=[path for path, lines in zip(paths, LINES, strict=True) if lines])
        case _:
            return JsonLines(paths)


def everything(source: RowSource) -> list[str]:
    if isinstance(source, TextRows) and source.per == "file":
        return sorted("".join(f"{line}\n" for line in lines) for lines in LINES)
    return sorted(line for lines in LINES for line in lines if line)


class TestRows:
    def test_every_row_once(self, source: RowSource) -> None:
        assert sorted(texts(source)) == everything(source)

    def test_the_key_determines_the_order(self, source: RowSource) -> None:
        assert texts(source) == texts(source)
        assert len({tuple(texts(source, key=str(epoch))) for epoch in range(12)}) > 1

    def test_contract(self, source: RowSource) -> None:
        check_row_source(source)


class TestRandomFiles:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
    @given(
        files=st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=5), min_size=1, max_size=4),
        world=st.integers(1, 3),
        data=st.data(),
    )
    def test_any_files(
        self, tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], world: int, data: st.DataObject
    ) -> None:
        folder = tmp_path_factory.mktemp("files")
        for number, lines in enumerate(files):
            content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
            (folder / f"{number}.jsonl").write_text(content, encoding="utf-8")
        source = JsonLines([str(folder)])
        shards = [list(source.rows("7", ShardSpec(rank, world))) for rank in range(world)]
        parsed = [source.parse(row)["text"] for shard in shards for row in shard]
        assert sorted(parsed) == sorted(line for lines in files for line in lines)
        rank = data.draw(st.integers(0, world - 1))
        if shards[rank]:
            index = data.draw(st.integers(0, len(shards[rank]) - 1))
            following = source.rows("7", ShardSpec(rank, world), shards[rank][index].position)
            assert [row.name for row in following] == [row.name for row in shards[rank][index + 1 :]]


class TestInvalidRows:
    @pytest.mark.parametrize("line", [b'{"text": ', b"[1, 2]", b"text", b'{"text": "\xff"}', b"[" * 100_000])
    def test_an_invalid_json_line_is_named(self, tmp_path: Path, line: bytes) -> None:
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
        source = JsonLines([str(path)])
        _, invalid = source.rows("0", ShardSpec())
        with pytest.raises(BadRowError, match="data.jsonl, line 3"):
            source.parse(invalid)

    @pytest.mark.parametrize(("per", "location"), [("line", "data.txt, line 2"), ("file", "data.txt")])
    def test_undecodable_bytes_are_named(self, tmp_path: Path, per: Any, location: str) -> None:
        (tmp_path / "data.txt").write_bytes(b"fine\nna\xefve\n")
        source = TextRows([str(tmp_path)], per=per)
        *_, invalid = source.rows("0", ShardSpec())
        with pytest.raises(BadRowError, match=f"UTF-8 text in .*{location}"):
            source.parse(invalid)

    def test_a_byte_order_mark_is_skipped(self, tmp_path: Path) -> None:
        (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
        assert texts(TextRows([str(tmp_path)], per="line")) == ["one", "two"]


class TestInvalidFiles:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("data.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9]),
            ("data.jsonl.gz", b'{"text": "a"}\n'),
            ("data.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 9)[:-30]),
        ],
        ids=["truncated gzip", "not compressed", "truncated xz"],
    )
    def test_a_file_that_cannot_be_decompressed_is_named(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"JsonLines.paths=.*{name} cannot be read"):
            texts(JsonLines([str(tmp_path / name)]))

    def test_a_file_that_datasets_cannot_read_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "data.txt").write_bytes(b"fine\nna\xefve\n")
        source = HubRows("text", data_files=str(tmp_path / "data.txt"))
        with pytest.raises(ValueError, match=r"HubRows.path=text .*data.txt.* cannot be read: UnicodeDecodeError"):
            texts(source)

    def test_a_file_with_other_columns_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
        (tmp_path / "b.jsonl").write_text('{"text": "b", "size": 1}\n')
        source = HubRows("json", data_files=[str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")])
        message = r"expected files of equal columns \['text'\], found [^\n]*b\.jsonl that differs in 'size'$"
        with pytest.raises(ValueError, match=message):
            list(source.rows("0", ShardSpec()))

    def test_a_deleted_file(self, tmp_path: Path) -> None:
        (tmp_path / "data.jsonl").touch()
        source = JsonLines([str(tmp_path / "data.jsonl")])
        (tmp_path / "data.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match="data.jsonl.*JsonLines"):
            texts(source)


class TestCompressedFiles:
    @pytest.mark.parametrize(
        ("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]
    )
    def test_are_decompressed(self, tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
        (tmp_path / f"data.txt.{ending}").write_bytes(compress(b"one\ntwo\nthree\n"))
        source = TextRows([str(tmp_path)], per="line")
        assert texts(source) == ["one", "two", "three"]
        first, *_ = source.rows("0", ShardSpec())
        assert [row.content for row in source.rows("0", ShardSpec(), first.position)] == [b"two\n", b"three\n"]


class TestMissingFiles:
    def test_no_paths(self) -> None:
        with pytest.raises(ValueError, match="at least one file for JsonLines"):
            JsonLines([])

    def test_a_path_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            TextRows([str(tmp_path / "nowhere")])

    def test_a_folder_without_matching_files(self, tmp_path: Path) -> None:
        (tmp_path / "data.csv").touch()
        with pytest.raises(FileNotFoundError, match=r"\*\*/\*.jsonl"):
            JsonLines([str(tmp_path)])

    def test_a_dataset_that_cannot_be_opened(self, tmp_path: Path) -> None:
        source = HubRows("parquet", data_files=str(tmp_path / "none.parquet"))
        with pytest.raises(FileNotFoundError, match=r"none.parquet.*data.parts"):
            next(source.rows("0", ShardSpec()))
