"""Paths that users give: of files and folders of this machine, not addresses."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]+:/")  # pathlib makes one slash of two; C:/ is a drive
READ = "it is not read; download it, and set"
WRITTEN = "nothing is written there; set a folder of this machine as"


def local_path(given: str | os.PathLike[str], key: str, advice: str = READ) -> Path:
    """The path that a user gives; `~` is the user's folder.

    Args:
        given: the path.
        key: the option or configuration key that holds it.
        advice: what to do instead of giving an address; `key` follows it.

    Raises:
        ValueError: it is an address.

    >>> local_path("s3://bucket/a.txt", "--prompts")
    Traceback (most recent call last):
    ValueError: expected a path, found the address s3://bucket/a.txt: it is not read; download it, and set --prompts
    """
    path = expanded(given)
    if is_address(given) and not path.exists():
        address = os.fspath(given) if isinstance(given, str) else re.sub(r":/(?!/)", "://", os.fspath(given), count=1)
        raise ValueError(f"expected a path, found the address {address}: {advice} {key}")
    return path


def local_folder(given: str | os.PathLike[str], key: str, advice: str = READ) -> Path:
    """The path of a folder that a user gives, which need not exist; arguments as in `local_path`.

    Raises:
        ValueError: it is an address, or a file is in its place or in that of a folder above.
    """
    folder = local_path(given, key, advice)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"expected a folder, found the file {path}: set {key}")
    return folder


def expanded(given: str | os.PathLike[str]) -> Path:
    """A path with the user's folder for `~`, and as it is for a user that does not exist."""
    path = Path(given)
    with suppress(RuntimeError):
        return path.expanduser()
    return path


def is_address(given: str | os.PathLike[str]) -> bool:
    """Whether it begins with a scheme.

    >>> is_address("https://example.org/a.txt"), is_address("C:/a.txt"), is_address("a.txt")
    (True, False, False)
    """
    return _ADDRESS.match(os.fspath(given)) is not None
