"""Rows of files: JSON lines, or plain text by file or by line. Files are local paths or URLs that fsspec opens."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.row_source import BadRowError, Position, RawRow, RowSource
from ptp_lightning.utils.local_paths import expanded
from ptp_lightning.utils.pretrained import clear_errors


@dataclass(frozen=True)
class FileRows(RowSource):
    """Rows of files. Files are read in a different order in each epoch, and each file from start to end.

    Args:
        paths: files, folders (searched for `pattern`) or URLs; .gz, .bz2, .xz and .zst files are decompressed.
        pattern: glob pattern of the files in a folder.

    Raises:
        ValueError: `paths` is empty.
        FileNotFoundError: a local path does not exist, or a folder contains no matching file.
    """

    paths: list[str]
    pattern: str = "**/*"

    def __post_init__(self) -> None:
        """Check the paths before any work starts."""
        if not self.paths:
            raise ValueError(f"expected at least one file for {type(self).__name__}, found none: set its paths")
        self.files()

    def files(self) -> list[str]:
        """All files, in the given order and sorted within folders."""
        found: list[str] = []
        for given in self.paths:
            path = expanded(given)
            if "://" in given:
                found.append(given)
            elif path.is_dir():
                inside = sorted(str(file) for file in path.glob(self.pattern) if file.is_file())
                if not inside:
                    raise FileNotFoundError(
                        f"expected files like {self.pattern} in {path}, found none: set the paths or the pattern of "
                        f"{type(self).__name__}"
                    )
                found.extend(inside)
            elif path.is_file():
                found.append(str(path))
            else:
                raise FileNotFoundError(
                    f"expected a file or folder at {path}, found nothing: set the paths of {type(self).__name__}"
                )
        return found

    def rows(self, key: str, shard: ShardSpec, position: Position | None = None) -> Iterator[RawRow]:
        """See `RowSource.rows`.

        Raises:
            FileNotFoundError: a file does not exist any more.
            ValueError: a file cannot be read, for example because it is truncated or compressed by another method.
        """
        files = self.files()
        random.Random(f"files/{key}").shuffle(files)
        position = {"file": 0, "offset": 0, "line": 0, "number": 0} if position is None else position
        for index in range(position["file"], len(files)):
            start = position if index == position["file"] else {"offset": 0, "line": 0, "number": position["number"]}
            with clear_errors(files[index], f"{type(self).__name__}.paths"):
                for row in self._file_rows(files[index], start):
                    position = row.position | {"file": index}
                    if shard.owns(position["number"] - 1):
                        yield row._replace(position=position)

    @abstractmethod
    def _file_rows(self, file: str, start: Position) -> Iterator[RawRow]:
        """Rows of one file after a position in it; `number` counts the rows of all files."""


@dataclass(frozen=True)
class JsonLines(FileRows):
    """JSON lines: one object per line, whose entries are the columns; empty lines are skipped.

    Args:
        paths: see `FileRows`.
        pattern: see `FileRows`.
    """

    pattern: str = "**/*.jsonl*"

    def _file_rows(self, file: str, start: Position) -> Iterator[RawRow]:
        return _lines(file, start)

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        """See `RowSource.parse`."""
        try:
            columns = json.loads(row.content)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise BadRowError(f"expected a JSON object in {row.name}, found {_shown(row.content)} ({error})") from error
        if not isinstance(columns, dict):
            raise BadRowError(f"expected a JSON object in {row.name}, found {_shown(row.content)}")
        return cast(dict[str, Any], columns)


@dataclass(frozen=True)
class TextRows(FileRows):
    """Plain UTF-8 text, with one column `text`.

    Args:
        paths: see `FileRows`.
        pattern: see `FileRows`.
        per: whether a document is a whole `file` or a non-empty `line`.
    """

    pattern: str = "**/*.txt*"
    per: Literal["file", "line"] = "file"

    def _file_rows(self, file: str, start: Position) -> Iterator[RawRow]:
        if self.per == "line":
            yield from _lines(file, start)
        elif start["line"] == 0:
            with _opened(file) as stream:
                content = stream.read()
            position = {"offset": len(content), "line": 1, "number": start["number"] + 1}
            yield RawRow(content, file, content, position)

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        """See `RowSource.parse`."""
        try:
            text = bytes(row.content).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRowError(f"expected UTF-8 text in {row.name}, found {error}") from error
        return {"text": text.rstrip("\r\n") if self.per == "line" else text}


def _lines(file: str, start: Position) -> Iterator[RawRow]:
    offset, line, number = start["offset"], start["line"], start["number"]
    with _opened(file) as stream:
        stream.seek(offset)
        for content in stream:
            offset += len(content)
            line += 1
            if content.strip():
                number += 1
                position = {"offset": offset, "line": line, "number": number}
                yield RawRow(content, f"{file}, line {line}", content, position)


def _opened(file: str) -> IO[bytes]:
    import fsspec

    opened: Any = fsspec.open(file, "rb", compression="infer")
    return cast(IO[bytes], opened.open())


def _shown(content: bytes, length: int = 60) -> str:
    text = content.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= length else text[:length] + "...")
