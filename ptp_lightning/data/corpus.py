"""Document streams: where text comes from, before anything is tokenised.

A corpus yields `Document`s of one split in a deterministic order. A new source is one class with `documents(split)`.
"""

import hashlib
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Split = Literal["train", "val", "test"]

# Shares of the hash range: of 100 files about 90 train, 5 validate, 5 test.
VAL_BUCKETS = range(90, 95)
TEST_BUCKETS = range(95, 100)

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One text and the name it is known by in messages (a path relative to its corpus)."""

    name: str
    text: str


class Corpus(ABC):
    """Anything that can list its documents, in the same order on every call."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of `split` in a fixed order."""


def split_of(name: str) -> Split:
    """The split of a document, decided by a hash of its name alone: adding a file never moves another one."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    if bucket in VAL_BUCKETS:
        return "val"
    if bucket in TEST_BUCKETS:
        return "test"
    return "train"


@dataclass(frozen=True)
class StandardLibrary(Corpus):
    """The source files of the running Python's standard library: real text that every installation has.

    Its own tests and everything installed into site-packages are left out. Splits follow `split_of` the path relative
    to the library, so a file is held out on every machine that has it.
    """

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the library's `.py` files of `split`, sorted by path.

        Raises:
            FileNotFoundError: this Python has no readable standard library source (a zipped or stripped build).
        """
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(
            path
            for path in root.rglob("*.py")
            if not (TEST_FOLDERS | FOREIGN_FOLDERS).intersection(path.relative_to(root).parts)
        )
        if not paths:
            raise FileNotFoundError(
                f"expected the standard library's .py files under {root}, found none: this Python ships no source. "
                "Set data.corpus to another corpus, ptp_lightning.data.TextFiles for instance."
            )
        for path in paths:
            name = path.relative_to(root).as_posix()
            if split_of(name) == split:
                yield Document(name, path.read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class TextFiles(Corpus):
    """Plain text files: one document a file.

    Args:
        paths: files or folders (folders are searched for `pattern`).
        pattern: glob of the files taken from a folder.
        held_out: `hash` splits by a hash of each file's name; `lines` cuts every file into its first 90 % of lines for
            training, 5 % for validation and 5 % for testing, for corpora of one or a few files.
    """

    paths: list[str]
    pattern: str = "**/*.txt"
    held_out: Literal["hash", "lines"] = "hash"

    def __post_init__(self) -> None:
        """Refuse an empty list, paths that do not exist and an unknown `held_out`, before any work starts."""
        if self.held_out not in ("hash", "lines"):
            raise ValueError(f"expected data.corpus.held_out to be hash or lines, found {self.held_out!r}")
        if not self.paths:
            raise ValueError("expected at least one file or folder, found an empty list: set data.corpus.paths")
        for path in self.paths:
            if not Path(path).exists():
                raise FileNotFoundError(f"expected a file or folder at {path}, found nothing: set data.corpus.paths")

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the files' texts of `split`, in the order given and sorted inside folders.

        Raises:
            ValueError: a file is not UTF-8 text (the file is named).
        """
        if split not in get_args(Split):
            raise ValueError(f"expected one of {get_args(Split)}, found {split!r}")
        for given in map(Path, self.paths):
            for path in sorted(filter(Path.is_file, given.glob(self.pattern))) if given.is_dir() else [given]:
                name = path.relative_to(given).as_posix() if given.is_dir() else path.name
                if self.held_out == "hash" and split_of(name) != split:
                    continue
                try:
                    text = path.read_text(encoding="utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"expected UTF-8 text in {path}, found {error}: set data.corpus.paths") from error
                if self.held_out == "lines":
                    lines = text.splitlines(keepends=True)
                    val, test = (len(lines) * buckets.start // 100 for buckets in (VAL_BUCKETS, TEST_BUCKETS))
                    text = "".join({"train": lines[:val], "val": lines[val:test], "test": lines[test:]}[split])
                yield Document(name, text)
