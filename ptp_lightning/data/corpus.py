"""Corpora: sources of text documents, before tokenisation.

A corpus yields the `Document`s of a split in a fixed order. A new corpus is one class with `documents(split)`.
"""

import hashlib
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ptp_lightning.utils.local_paths import local_path

Split = Literal["train", "val", "test"]

# A document is assigned to one of 100 buckets by a hash; buckets 0 to 89 are for training.
VAL_BUCKETS = range(90, 95)
TEST_BUCKETS = range(95, 100)
FEWEST_LINES = 100 // len(VAL_BUCKETS)  # of a file that has lines of each split

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """A text and its name, a path relative to the corpus."""

    name: str
    text: str


class Corpus(ABC):
    """A source of documents, in the same order on every call."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of `split` in a fixed order."""

    @property
    def advice(self) -> str:
        """What to do if a split has no text."""
        return "set data.corpus"


def split_of(name: str) -> Split:
    """The split of a document, from a hash of its name alone, so that a new file does not move other files.

    >>> split_of("random.py"), split_of("uuid.py")
    ('train', 'val')
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    if bucket in VAL_BUCKETS:
        return "val"
    if bucket in TEST_BUCKETS:
        return "test"
    return "train"


@dataclass(frozen=True)
class StandardLibrary(Corpus):
    """The source files of Python's standard library: real text that every installation has.

    Without the library's own tests and without site-packages. The split of a file follows from its path relative to
    the library (`split_of`), so that a file is in the same split on every machine.
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
                f"expected the standard library's .py files in {root}, found none, because this Python ships no "
                "source: set data.corpus to another corpus, for example ptp_lightning.data.TextFiles"
            )
        for path in paths:
            name = path.relative_to(root).as_posix()
            if split_of(name) == split:
                yield Document(name, path.read_text(encoding="utf-8", errors="replace"))


STREAMED = "stream it with ptp_lightning.data.StreamingCorpus, or download it, and set"


@dataclass(frozen=True)
class TextFiles(Corpus):
    """Plain text files; each file is a document.

    Args:
        paths: files, or folders that are searched for `pattern`.
        pattern: glob pattern of the files in a folder.
        held_out: `hash` assigns whole files by a hash of their name. `lines`, for corpora of a few files, splits each
            file: the first 90 % of lines are for training, then 5 % for validation and 5 % for testing.
    """

    paths: list[str]
    pattern: str = "**/*.txt"
    held_out: Literal["hash", "lines"] = "hash"

    def __post_init__(self) -> None:
        """Check the arguments before any work starts."""
        if self.held_out not in ("hash", "lines"):
            raise ValueError(f"expected data.corpus.held_out to be hash or lines, found {self.held_out!r}")
        if not self.paths:
            raise ValueError("expected at least one file or folder, found an empty list: set data.corpus.paths")
        for path in self.paths:
            if not local_path(path, "data.corpus.paths", STREAMED).exists():
                raise FileNotFoundError(f"expected a file or folder at {path}, found nothing: set data.corpus.paths")

    @property
    def advice(self) -> str:
        """See `Corpus.advice`."""
        if self.held_out == "lines":
            return f"set data.corpus.paths to files of {FEWEST_LINES} lines or more"
        return "set data.corpus (for a corpus of few files, set data.corpus.held_out: lines)"

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
