"""Completions: texts that a teacher generated after prompts, stored with the settings that determine them.

A folder contains `completions.json` with the common settings, and Parquet shards with a fixed range of prompts each.
The content of a shard depends only on the settings and on its number.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.atomic_files import write_atomically
from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.pretrained import clear_errors, few, listing

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
SETTINGS_FILE = "completions.json"
FOLDER_KEY = "data.folder"
DEFAULTS_OF_EARLIER_FOLDERS = {"greedy_fraction": 0.0}  # entries that this format version did not always have
COMPRESSION = "zstd"
# Paths may differ between runs that use the same model and tokenizer; other fields identify them.
PATH_FIELDS = frozenset({"teacher_path", "tokenizer"})


@dataclass(frozen=True)
class CompletionSettings:
    """The common settings of all completions of a folder.

    Attributes:
        teacher: fingerprint of the teacher's weights.
        teacher_path: path or hub id of the teacher.
        teacher_dtype: of the teacher's weights.
        sampling: settings with which the teacher's tokens were sampled.
        max_new_tokens: maximum length of a completion, which ends earlier at one of `ending_ids`.
        seed: from which the seeds of the completions are derived.
        num_prompts: P.
        num_completions: n, completions per prompt.
        prompts: fingerprint of the prompts' tokens, see `prompts_fingerprint`.
        shard_prompts: prompts per shard; the last shard may have fewer.
        vocab_size: V, token ids are 0 .. V - 1.
        end_of_text: the end-of-text token id, if there is one.
        ending_ids: all token ids that end a completion, ascending.
        tokenizer: path or hub id of the tokenizer, if the prompts are text.
        greedy_fraction: share of the prompts whose first completion is greedy, whatever `sampling` says.
        format_version: of the folder.
    """

    teacher: str
    teacher_path: str
    teacher_dtype: str
    sampling: SamplingConfig
    max_new_tokens: int
    seed: int
    num_prompts: int
    num_completions: int
    prompts: str
    shard_prompts: int
    vocab_size: int
    end_of_text: int | None
    ending_ids: tuple[int, ...]
    tokenizer: str | None
    greedy_fraction: float = 0.0
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Number of shards of a complete folder."""
        return -(-self.num_prompts // self.shard_prompts)

    def prompts_of(self, shard: int) -> range:
        """Numbers of the prompts of a shard."""
        begin = shard * self.shard_prompts
        return range(begin, min(begin + self.shard_prompts, self.num_prompts))

    def seed_of(self, prompt: int, completion: int) -> int:
        """The seed of one completion, 0 .. 2^63 - 1. It does not depend on the order or process of generation."""
        digest = hashlib.sha256(f"{self.seed}/completion/{prompt}/{completion}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def is_greedy(self, prompt: int, completion: int) -> bool:
        """Whether a completion consists of the most likely tokens."""
        digest = hashlib.sha256(f"{self.seed}/greedy/{prompt}".encode()).digest()
        return completion == 0 and int.from_bytes(digest[:8], "big") < self.greedy_fraction * 2**64

    def differences(self, other: CompletionSettings) -> list[str]:
        """Names of the settings that differ; paths are ignored."""
        names = [field.name for field in fields(self) if field.name not in PATH_FIELDS]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def to_json(self) -> bytes:
        """The content of `completions.json`."""
        plain = asdict(self) | {"sampling": self.sampling.to_dict()}
        return (json.dumps(plain, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, text: str) -> CompletionSettings:
        """Inverse of `to_json`.

        Raises:
            ValueError: the file has other entries or another format version.
        """
        plain: dict[str, Any] = json.loads(text)
        version = plain.get("format_version") if isinstance(plain, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}, found {version!r}")
        names = {field.name for field in fields(cls)}
        plain = DEFAULTS_OF_EARLIER_FOLDERS | plain
        if plain.keys() != names:
            raise ValueError(f"expected the entries {sorted(names)}, found {sorted(plain)}")
        sampling, ending_ids = SamplingConfig(**plain["sampling"]), tuple(plain["ending_ids"])
        return cls(**(plain | {"sampling": sampling, "ending_ids": ending_ids}))


def prompts_fingerprint(prompts: Iterable[Sequence[int]]) -> str:
    """SHA-256 of the prompts' tokens, to detect a changed corpus.

    >>> prompts_fingerprint([[1, 2], [3]])[:8]
    'be3cb7e0'
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.asarray([len(prompt), *prompt], dtype="<i8").tobytes())
    return digest.hexdigest()


class Completion(NamedTuple):
    """One text of the teacher.

    Attributes:
        prompt: number of the prompt.
        completion: number among the completions of this prompt.
        seed: of the auxiliary variables with which its tokens were sampled.
        prompt_ids: token ids of the prompt.
        completion_ids: token ids of the completion.
    """

    prompt: int
    completion: int
    seed: int
    prompt_ids: list[int]
    completion_ids: list[int]


class RaggedIds(NamedTuple):
    """Token ids of sequences of different lengths, concatenated.

    Attributes:
        values: int32, of all sequences.
        offsets: int64, start of each sequence, and end of the last.

    >>> RaggedIds(np.array([5, 6, 7]), np.array([0, 2, 3])).of(0)
    [5, 6]
    """

    values: np.ndarray
    offsets: np.ndarray

    def of(self, row: int) -> list[int]:
        """The ids of one sequence."""
        return self.values[self.offsets[row] : self.offsets[row + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """int64, length of each sequence."""
        return np.diff(self.offsets)

    @classmethod
    def joined(cls, parts: Sequence[RaggedIds]) -> RaggedIds:
        """All sequences of several parts.

        >>> part = RaggedIds(np.array([5, 6, 7]), np.array([0, 2, 3]))
        >>> RaggedIds.joined([part, part]).offsets.tolist()
        [0, 2, 3, 5, 6]
        """
        ends = np.cumsum([0, *(len(part.values) for part in parts)])
        offsets = [part.offsets[:-1] + begin for part, begin in zip(parts, ends, strict=False)]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([*offsets, ends[-1:]]))


class CompletionTable(NamedTuple):
    """D completions in memory, four bytes per token.

    Attributes:
        prompts: `[D]` int64, prompt number of each completion.
        prompt_ids: token ids of the prompts.
        completion_ids: token ids of the completions.
    """

    prompts: np.ndarray
    prompt_ids: RaggedIds
    completion_ids: RaggedIds


class CompletionFolder:
    """A folder of completions.

    Args:
        path: of the folder.
        settings: common to its completions.
    """

    def __init__(self, path: Path, settings: CompletionSettings) -> None:
        self.path = path
        self.settings = settings

    @classmethod
    def open(cls, path: str | Path) -> CompletionFolder:
        """Open an existing folder, complete or not.

        Raises:
            FileNotFoundError: the folder does not exist, or contains no `completions.json`.
            ValueError: `completions.json` is invalid.
        """
        folder = local_path(path, FOLDER_KEY)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"expected a folder written by `python -m ptp_lightning pregenerate` at {folder}, found none: "
                f"set {FOLDER_KEY}"
            )
        stored = folder / SETTINGS_FILE
        if not stored.is_file():
            raise FileNotFoundError(f"expected {SETTINGS_FILE} in {folder}, found {listing(folder)}: set {FOLDER_KEY}")
        with clear_errors(stored, FOLDER_KEY):
            return cls(folder, CompletionSettings.from_json(stored.read_text(encoding="utf-8")))

    @classmethod
    def create(cls, path: str | Path, settings: CompletionSettings) -> CompletionFolder:
        """Create a folder to write to, or continue one with the same settings.

        Raises:
            ValueError: the folder was created with other settings, or is not a folder of completions.
            OSError: the folder cannot be written to.
        """
        folder = local_path(path, "--output", WRITTEN)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"expected a folder at {folder}, found a file: choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / SETTINGS_FILE
        if not stored.is_file():
            if any(folder.glob("*.parquet")):
                raise ValueError(f"expected {SETTINGS_FILE} beside the shards in {folder}, found none: set --output")
            write_atomically(stored, settings.to_json())
        found = cls.open(folder).settings  # perhaps written by another process
        if different := settings.differences(found):
            pairs = (f"{name} {getattr(found, name)}, found {getattr(settings, name)}" for name in different)
            raise ValueError(
                f"expected the settings with which {folder} was created: {'; '.join(pairs)}: choose another --output, "
                "or the same settings"
            )
        return cls(folder, settings)

    def shard_path(self, shard: int) -> Path:
        """Path of a shard, which may not exist yet."""
        return self.path / f"shard-{shard:05d}.parquet"

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that do not exist yet."""
        present = {path.name for path in self.path.glob("*.parquet")}
        return [k for k in range(self.settings.num_shards) if self.shard_path(k).name not in present]

    def write_shard(self, shard: int, completions: Sequence[Completion]) -> None:
        """Write a shard atomically.

        Raises:
            OSError: no space or no permission; no incomplete file is left.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [list(column) for column in zip(*completions, strict=True)]
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=_schema()), buffer, compression=COMPRESSION)
        write_atomically(self.shard_path(shard), buffer.getvalue())

    def read(self) -> CompletionTable:
        """All completions of the existing shards.

        Raises:
            FileNotFoundError: there are no shards.
            ValueError: a file does not match the settings; the message names it.
        """
        missing = set(self.missing_shards())
        shards = [shard for shard in range(self.settings.num_shards) if shard not in missing]
        if not shards:
            raise FileNotFoundError(
                f"expected shards of completions in {self.path}, found {listing(self.path)}: set {FOLDER_KEY}"
            )
        parts = [self._read_shard(shard) for shard in shards]
        return CompletionTable(
            np.concatenate([part.prompts for part in parts]),
            RaggedIds.joined([part.prompt_ids for part in parts]),
            RaggedIds.joined([part.completion_ids for part in parts]),
        )

    def sizes(self) -> tuple[int, int]:
        """(new tokens, bytes) of the existing shards."""
        import pyarrow.parquet as pq

        paths = [path for shard in range(self.settings.num_shards) if (path := self.shard_path(shard)).is_file()]
        tables = [pq.ParquetFile(path).read(columns=["completion_ids"]) for path in paths]
        num_tokens = sum(len(chunk.flatten()) for table in tables for chunk in table["completion_ids"].chunks)
        return num_tokens, sum(path.stat().st_size for path in paths)

    def _read_shard(self, shard: int) -> CompletionTable:
        import pyarrow.parquet as pq

        path = self.shard_path(shard)
        with clear_errors(path, FOLDER_KEY):
            # `read_table` would interpret folder names as columns.
            table = pq.ParquetFile(path).read()
        expected = _schema()
        found = {field.name: field.type for field in table.schema}
        if wrong := [field for field in expected if found.get(field.name) != field.type]:
            columns = few(f"{name} ({kind})" for name, kind in found.items())
            raise ValueError(
                f"expected a column {wrong[0].name} ({wrong[0].type}) in {path}, found {columns}: set {FOLDER_KEY}"
            )
        prompts, completions = (table[name].to_numpy() for name in ("prompt", "completion"))
        numbers = self.settings.prompts_of(shard)
        of_prompt = self.settings.num_completions
        if not (
            np.array_equal(prompts, np.repeat(np.arange(numbers.start, numbers.stop), of_prompt))
            and np.array_equal(completions, np.tile(np.arange(of_prompt), len(numbers)))
        ):
            raise ValueError(
                f"expected {of_prompt} completions of each of the prompts {numbers.start} to {numbers.stop - 1} in "
                f"{path}, found {len(prompts)} rows of other completions: set {FOLDER_KEY}, or remove the file and "
                "pregenerate it again"
            )
        prompt_ids, completion_ids = (self._ids(table[name], path, name) for name in ("prompt_ids", "completion_ids"))
        return CompletionTable(prompts.astype(np.int64), prompt_ids, completion_ids)

    def _ids(self, column: pa.ChunkedArray, path: Path, name: str) -> RaggedIds:
        with clear_errors(path, FOLDER_KEY):  # an entry may be null
            array: Any = column.combine_chunks()
            values, offsets = array.values.to_numpy(), array.offsets.to_numpy().astype(np.int64)
        vocab_size = self.settings.vocab_size
        if (np.diff(offsets) == 0).any():
            raise ValueError(f"expected at least one token in each {name} of {path}, found none: set {FOLDER_KEY}")
        if values.min() < 0 or values.max() >= vocab_size:
            worst = values.max() if values.min() >= 0 else values.min()
            raise ValueError(
                f"expected token ids in 0 .. {vocab_size - 1} in {name} of {path}, found {worst}: set {FOLDER_KEY}"
            )
        return RaggedIds(values, offsets)


def _schema() -> pa.Schema:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    columns = {"prompt": pa.int32(), "completion": pa.int32(), "seed": pa.int64()}
    return pa.schema(list((columns | {"prompt_ids": ids, "completion_ids": ids}).items()))
