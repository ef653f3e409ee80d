"""Predictors on the Hugging Face hub: found by their id, downloaded into its cache, and uploaded.

The functions of `huggingface_hub` are used, not its `ModelHubMixin`. The mixin owns `config.json` in a folder: it reads
arguments of the constructor from this file and deletes it before it saves. In a folder with the base model that file is
the base model's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ptp_lightning.export.card_metadata import hub_name
from ptp_lightning.export.migrations import CHECKPOINT_KEY
from ptp_lightning.utils.pretrained import EMBEDDED

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>[\w./-]+))?", re.ASCII)
LOCAL_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".bin", ".gguf", ".json")


class HubId(NamedTuple):
    """A repository of the hub.

    Attributes:
        repo: "user/name".
        revision: branch, tag or commit; None for the newest commit.
    """

    repo: str
    revision: str | None


def hub_id(source: str | Path) -> HubId | None:
    """What "user/name" or "user/name@revision" names on the hub; None for anything that looks like a local path.

    >>> hub_id("user/name@v1")
    HubId(repo='user/name', revision='v1')
    >>> hub_id("runs/last.ckpt"), hub_id("./user/name"), hub_id("name")
    (None, None, None)
    """
    match = HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if match is None or match["repo"].endswith(LOCAL_SUFFIXES):
        return None
    return HubId(match["repo"], match["revision"])


def download(source: HubId, files: Sequence[str]) -> Path:
    """The folder in the hub's cache with these files of a repository; those that it does not have are left out.

    Args:
        source: the repository.
        files: names or patterns. Nothing else is downloaded.

    Raises:
        FileNotFoundError: there is no such repository, or none of these files in it, or it can neither be reached nor
            found in the cache; says what was tried.
    """
    from huggingface_hub import constants, snapshot_download

    expected = f"expected a file, a folder or a repository of the hub at {source.repo}"
    with _clear_errors(expected, CHECKPOINT_KEY, FileNotFoundError):
        folder = Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=list(files)))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a predictor in {constants.ENDPOINT}/{source.repo}, found none of {', '.join(files)}: set "
            f"{CHECKPOINT_KEY}"
        )
    return folder


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload predictor",
) -> str:
    """Create a repository of the hub if there is none, and upload a folder into it in one commit.

    Further arguments, the result and errors as in `ParallelTokenPredictor.push_to_hub`.
    """
    from huggingface_hub import HfApi

    if hub_id(repo) is None or "@" in repo:
        raise ValueError(f"expected an id of the hub as in user/name, found {repo!r}: set repo_id")
    api = HfApi(token=token)
    with _clear_errors(f"expected to upload a predictor to the hub as {repo}", "repo_id or token", ConnectionError):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.commit_url


def warn_of_local_base(base_model: str) -> None:
    """Say that others cannot open an adapter whose base model is a file or folder of this machine.

    Args:
        base_model: its path or id.
    """
    if base_model != EMBEDDED and hub_name(base_model) is None:
        warnings.warn(
            f"the base model is {base_model} of this machine, which others do not have: they open the adapter with "
            "--base USER/MODEL (base= in Python), or you write the id of the hub into it: export --base USER/MODEL, "
            "from_pretrained(.., base=..) before push_to_hub",
            stacklevel=3,
        )


@contextmanager
def _clear_errors(expected: str, key: str, kind: type[OSError]) -> Iterator[None]:
    """Turns errors of `huggingface_hub` into one of this kind, in one line."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    try:
        yield
    except (OSError, HFValidationError, httpx.HTTPError) as error:
        raise kind(f"{expected}, found {_reason(error)}: set {key}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, cache = constants.ENDPOINT, f"and nothing in the cache {constants.HF_HUB_CACHE}"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None else error
    if isinstance(cause, OfflineModeIsEnabled):
        return f"that {hub} may not be asked (HF_HUB_OFFLINE is set), {cache}"
    if isinstance(cause, GatedRepoError):
        return f"that {hub} wants its terms to be accepted there first, and then `hf auth login`"
    if isinstance(cause, RepositoryNotFoundError):
        return f"no file or folder of that name, and no public repository at {hub} (private ones need `hf auth login`)"
    if isinstance(cause, RevisionNotFoundError):
        return f"a repository at {hub} without this revision"
    if isinstance(cause, HfHubHTTPError):
        return f"that {hub} refuses with status {cause.response.status_code} ({_line(cause)})"
    return f"that {hub} cannot be reached ({type(cause).__name__}: {_line(cause)}), {cache}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
