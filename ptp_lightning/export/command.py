"""The command `export`: writes a checkpoint as a folder of adapter, slot encoder, settings and model card."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ptp_lightning.export.checkpoint import build_network, require_free_folder, save_network
from ptp_lightning.export.hub import warn_of_local_base
from ptp_lightning.export.model_folder import save_with_base_model
from ptp_lightning.export.stored_predictor import EXPORTED_FILES, read_predictor
from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.user_errors import warnings_as_notes

if TYPE_CHECKING:
    from jsonargparse import Namespace

BYTES_PER_KILOBYTE = 1000


def run(options: Namespace) -> None:
    """Write the folder, and print its files and the next command.

    Raises:
        ValueError: an option is out of range, the folder is not free, or the checkpoint does not fit its
            base model; nothing is written.
        FileNotFoundError: the checkpoint or its base model is missing.
    """
    if options.with_base_model and options.overwrite:
        raise ValueError("expected --with_base_model without --overwrite, found both: choose a new --output")
    require_free_folder(options.output, overwrite=options.overwrite)  # before the model is loaded
    stored = read_predictor(options.ckpt_path)
    with warnings_as_notes():
        predictor = build_network(stored, base=options.base, trust_custom_classes=options.trust_custom_classes)
        if not options.with_base_model:
            warn_of_local_base(predictor.config.backbone.path)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    about: dict[str, Any] = {"dtype": dtype, "training": stored.training, "license": options.license}
    try:
        if options.with_base_model:
            save_with_base_model(predictor, options.output, **about)
        else:
            save_network(predictor, options.output, overwrite=options.overwrite, **about)
    except (OSError, SafetensorError) as error:  # no permission, no space
        raise ValueError(f"cannot write {options.output}: {error}: set --output") from error
    folder = local_path(options.output, "--output", WRITTEN)
    print(_summary_with_base_model(folder) if options.with_base_model else _summary(folder))


def _summary_with_base_model(folder: Path) -> str:
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    serve = f"transformers serve {shlex.quote(str(folder))} --trust-remote-code"
    return f"Wrote {folder}\nNext  model = {load}; model.generate(...)\n  or  {serve}"


def _summary(folder: Path) -> str:
    sizes = {name: (folder / name).stat().st_size for name in EXPORTED_FILES}
    lines = [f"  {name:<28}{size / BYTES_PER_KILOBYTE:>10,.1f} kB" for name, size in sizes.items()]
    total = f"  {'':<28}{sum(sizes.values()) / BYTES_PER_KILOBYTE:>10,.1f} kB"
    command = f'python -m ptp_lightning generate --ckpt_path {shlex.quote(str(folder))} --prompt "def "'
    return "\n".join([f"Wrote {folder}", *lines, total, f"Next  {command}"])
