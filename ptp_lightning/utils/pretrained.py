"""Locations of pretrained models (embedded, packaged, hub id, folder, GGUF file), and how they are opened."""

from __future__ import annotations

import importlib.util
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptp_lightning.utils.local_paths import expanded, local_path
from ptp_lightning.utils.packaged_models import PACKAGED_MODELS, packaged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded"
PATH_KEY = "predictor.backbone.path"
TOKENIZER_KEY = "data.tokenizer"
GGUF_MAGIC = b"GGUF"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
HUB_ADVICE = "give an id of the hub as user/name, or download it, and set"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def embedded_folder(name: str = "embedded_teacher") -> Path:
    """The folder of a model that ships with the package."""
    return Path(str(resources.files("ptp_lightning"))) / "assets" / name


def locate(path: str, *, revision: str | None = None, key: str = PATH_KEY) -> dict[str, Any]:
    """Keyword arguments with which `from_pretrained` opens `path`; local files are opened without the network.

    `trust_remote_code` is false: left out, transformers asks on the terminal whether to run a model's own code.

    Args:
        path: "embedded", the name of a packaged model ("smollm2"), a folder, a GGUF file, or a hub id.
        revision: branch, tag or commit of a hub id.
        key: configuration key for error messages.

    Raises:
        FileNotFoundError: `path` looks like a local path, but nothing is there.
        ValueError: it is a file of another format than GGUF.
        ImportError: a GGUF file needs the package `gguf`.
    """
    if path in PACKAGED_MODELS:
        return {"pretrained_model_name_or_path": str(packaged_folder(path, key=key)), **LOCAL}
    local = embedded_folder() if path == EMBEDDED else local_path(path, key, HUB_ADVICE)
    if local.is_dir():
        return {"pretrained_model_name_or_path": str(local), **LOCAL}
    if local.is_file():
        _require_gguf(local, key)
        return {"pretrained_model_name_or_path": str(local.parent), "gguf_file": local.name, **LOCAL}
    if local.is_absolute() or local.suffix == ".gguf" or path.startswith((".", "~")) or path.count("/") > 1:
        expected = "GGUF file" if local.suffix == ".gguf" else "model folder"
        raise FileNotFoundError(f"expected a {expected} at {local}, found nothing: set {key}")
    return {"pretrained_model_name_or_path": path, "revision": revision, "trust_remote_code": False}


def absolute_if_local(path: str) -> str:
    """The absolute path of a file or folder; names of packaged models and hub ids as they are.

    >>> absolute_if_local("embedded")
    'embedded'
    """
    if path == EMBEDDED or path in PACKAGED_MODELS:
        return path
    local = expanded(path)
    return str(local.absolute()) if local.exists() else path


def load_tokenizer(path: str, *, revision: str | None = None, key: str = TOKENIZER_KEY) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path` (arguments as in `locate`); it need not have an end-of-text token.

    Raises:
        FileNotFoundError: nothing is at a local path, or its folder has no tokenizer.
        ValueError: the tokenizer cannot be read.
        ImportError: a GGUF file needs the package `gguf`.
    """
    from transformers import AutoTokenizer

    source = locate(path, revision=revision, key=key)
    is_local = "local_files_only" in source
    if is_local and "gguf_file" not in source:
        folder = Path(source["pretrained_model_name_or_path"])
        if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
            raise FileNotFoundError(f"expected a tokenizer in {folder}, found {listing(folder)}: set {key}")
    with clear_errors(path, key), quiet_transformers(progress_bar=not is_local):
        return AutoTokenizer.from_pretrained(**source)


@contextmanager
def clear_errors(path: str | Path, key: str) -> Iterator[None]:
    """Turns any error of a file reader into a ValueError that names the path and the key."""
    try:
        yield
    except ImportError:  # its message says what to install
        raise
    except pickle.UnpicklingError as error:  # torch advises to load the file with its code
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"{code[1]}, which could run code" if code else "something else"
        raise ValueError(
            f"{key}={path} cannot be read: expected weights and plain data, found {found}: ask for an exported folder "
            "(safetensors) where the file is not your own"
        ) from error
    except Exception as error:  # readers raise struct.error, SafetensorError, OSError, RuntimeError, ...
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{key}={path} cannot be read: {type(error).__name__}: {reason}") from error


def require_torch_file(file: Path, key: str) -> None:
    """Refuse a file that `torch.save` has not written, or has not written to its end.

    Args:
        file: an existing file.
        key: configuration key for the error message.

    Raises:
        ValueError: it is no such file.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{key}={file} cannot be read: expected a complete checkpoint, found another kind of file")


@contextmanager
def quiet_transformers(progress_bar: bool) -> Iterator[None]:
    """Hides the loading reports of transformers, which we check ourselves, and progress bars without a download."""
    from transformers.utils import logging

    verbosity, had_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress_bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar and not progress_bar:
            logging.enable_progress_bar()


def few(names: Iterable[object], limit: int = 4) -> str:
    """The first names in alphabetical order and the number of others.

    >>> few("edcba", limit=2)
    'a, b and 3 more'
    """
    ordered = sorted(str(name) for name in names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


def listing(folder: Path) -> str:
    """Contents of a folder, for an error message."""
    return few(entry.name for entry in folder.iterdir()) or "an empty folder"


def _require_gguf(file: Path, key: str) -> None:
    with file.open("rb") as stream:
        magic = stream.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ValueError(f"expected a model folder or a GGUF file, found that {file} starts with {magic!r}: set {key}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{key}={file} needs the package gguf: pip install 'ptp_lightning[gguf]'")
