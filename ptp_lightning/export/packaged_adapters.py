"""Adapters that ship with the package, by name: `generate --model smollm2`, `from_pretrained("smollm2")`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptp_lightning.utils.pretrained import embedded_folder

DEFAULT_ADAPTER = "code"
SETTINGS_FILE = "predictor.json"  # an adapter folder without it is not there


@dataclass(frozen=True)
class PackagedAdapter:
    """An adapter folder inside the package.

    Args:
        base: name of its base model, for messages.
        folder: in `ptp_lightning/assets`.
        config: the configuration that trains it.
    """

    base: str
    folder: str
    config: str


PACKAGED_ADAPTERS = {
    DEFAULT_ADAPTER: PackagedAdapter("the embedded code model", "embedded_adapter", "code_categorical"),
    "smollm2": PackagedAdapter("SmolLM2-135M-Instruct", "smollm2", "smollm2"),
}
"""By the name that `--model` and `ParallelTokenPredictor.from_pretrained` take."""


def packaged_adapter_folder(name: str) -> Path:
    """The folder of a packaged adapter.

    Args:
        name: one of `PACKAGED_ADAPTERS`.

    Raises:
        FileNotFoundError: this version of the package comes without it.

    >>> packaged_adapter_folder("code").name
    'embedded_adapter'
    """
    adapter = PACKAGED_ADAPTERS[name]
    folder = embedded_folder(adapter.folder)
    if not (folder / SETTINGS_FILE).is_file():
        present = [key for key, one in PACKAGED_ADAPTERS.items() if _is_present(one)]
        raise FileNotFoundError(
            f"expected the adapter {name!r} (for {adapter.base}) at {folder}, found nothing, this version comes "
            f"without it: set model to one that is there ({', '.join(present) or 'none is'}), or train it (fit "
            f"--config {adapter.config}) and set ckpt_path"
        )
    return folder


def _is_present(adapter: PackagedAdapter) -> bool:
    return (embedded_folder(adapter.folder) / SETTINGS_FILE).is_file()
