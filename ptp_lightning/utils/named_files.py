"""Configurations and studies by name: those of the repository, which an installed package brings along."""

from __future__ import annotations

from importlib import resources
from os.path import isfile  # unlike Path.is_file it accepts any text, a configuration in YAML for instance
from pathlib import Path
from typing import Literal

from ptp_lightning.utils.local_paths import is_address, local_path

Kind = Literal["configs", "sweeps"]
SUFFIX = ".yaml"
NAMED_BY: dict[Kind, str] = {"configs": "--config", "sweeps": "the study"}


def shipped_folder(kind: Kind) -> Path:
    """The folder of the configurations (`configs`) or studies (`sweeps`) that come with the package.

    In a source checkout it is the top-level folder of that name; a wheel has a copy inside the package.
    """
    package = Path(str(resources.files("ptp_lightning")))
    installed = package / "shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def shipped_names(kind: Kind) -> list[str]:
    """Names of the shipped files, without the suffix.

    >>> "losses" in shipped_names("sweeps"), "strategy/ddp" in shipped_names("configs")
    (True, True)
    """
    folder = shipped_folder(kind)
    return sorted(str(path.relative_to(folder).with_suffix("").as_posix()) for path in folder.rglob(f"*{SUFFIX}"))


def find_yaml(name: str, kind: Kind) -> Path:
    """The file at a path, or the shipped one of that name.

    `losses`, `losses.yaml` and `sweeps/losses.yaml` all find the shipped study, whatever the current folder is; a file
    that exists at the path comes first.

    Args:
        name: path or name.
        kind: where to look.

    Returns:
        An existing file, or `name` as a path if there is none.

    Raises:
        ValueError: it is an address.

    >>> find_yaml("losses", "sweeps").name
    'losses.yaml'
    """
    given = Path(name)
    if isfile(name) or given.is_absolute():
        return given
    if is_address(name):
        return local_path(name, NAMED_BY[kind])
    inner = given.relative_to(kind) if given.parts[:1] == (kind,) else given
    shipped = shipped_folder(kind) / f"{inner.as_posix().removesuffix(SUFFIX)}{SUFFIX}"
    return shipped if ".." not in inner.parts and isfile(shipped) else given
