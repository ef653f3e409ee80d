"""The version of this package that trained a trial."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import ptp_lightning

GIT_SECONDS = 10.0


@functools.cache
def package_version() -> str:
    """The package's version, with the commit if it is imported from a checkout: `0.2.0+91cc016`.

    `.dirty` follows if files of the checkout have been changed.
    """
    package = Path(ptp_lightning.__file__).parent
    commit = ""
    if (package.parent / ".git").exists():  # an installed package may lie in the checkout of something else
        commit = _git(package, "describe", "--always", "--dirty=.dirty", "--exclude=*")
    return f"{ptp_lightning.__version__}+{commit}" if commit else ptp_lightning.__version__


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
