"""Text files of users: one item per line."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from ptp_lightning.utils.local_paths import local_path


def read_lines(path: str | Path, expected: str, key: str) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1.

    Lines end with a line feed, or with carriage return and line feed. Other characters that Unicode calls line
    boundaries, such as U+2028, are part of a line. A byte order mark is left out.

    Args:
        path: of the file; compressed if its name ends in ".gz".
        expected: what the lines are, for errors.
        key: the option that gives the path, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is an address, or the file is not UTF-8 text, is no gzip file though named so, or has no
            lines.
    """
    path = local_path(path, key)
    if not path.is_file():
        raise FileNotFoundError(f"expected {expected} at {path}, found no file: set {key}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in {path}, found {error}: set {key}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"expected a complete gzip file at {path}, found {error}: set {key}") from error
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ValueError(f"expected {expected} in {path}, found no lines with text: set {key}")
    return lines
