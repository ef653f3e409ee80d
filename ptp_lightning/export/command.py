"""The command `export`: writes a checkpoint as a folder of adapter, slot encoder, settings and model card."""

from __future__ import annotations

import shlex
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError

from ptp_lightning.export.checkpoint import (
    EXPORTED_FILES,
    build_network,
    read_predictor,
    require_free_folder,
    save_network,
)
from ptp_lightning.export.model_folder import save_with_base_model
from ptp_lightning.export.options import add_trust_option
from ptp_lightning.utils.user_errors import refused_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

BYTES_PER_KILOBYTE = 1000


def run(args: Sequence[str]) -> None:
    """Write the folder, and print its files and the next command.

    Raises:
        ValueError: an option is unknown or out of range, the folder is not free, or the checkpoint does not fit its
            base model; nothing is written.
        FileNotFoundError: the checkpoint or its base model is missing.
    """
    try:
        options = _parser().parse_args(list(args))
    except ArgumentError as error:
        raise refused_options("export", error) from error
    if options.with_base_model and options.overwrite:
        raise ValueError("expected --with_base_model without --overwrite, found both: choose a new --output")
    require_free_folder(options.output, overwrite=options.overwrite)  # before the model is loaded
    stored = read_predictor(options.ckpt_path)
    predictor = build_network(stored, trust_custom_classes=options.trust_custom_classes)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        if options.with_base_model:
            save_with_base_model(predictor, options.output, dtype=dtype, training=stored.training)
        else:
            save_network(predictor, options.output, dtype=dtype, overwrite=options.overwrite, training=stored.training)
    except (OSError, SafetensorError) as error:  # no permission, no space
        raise ValueError(f"cannot write {options.output}: {error}: set --output") from error
    folder = Path(options.output).expanduser()
    print(_summary_with_base_model(folder) if options.with_base_model else _summary(folder))


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m ptp_lightning export",
        description="Write a trained predictor, without base weights, as a folder that PEFT and ptp_lightning open.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt_path", type=str, required=True, help="Lightning checkpoint, or an earlier export")
    add("--output", type=str, required=True, help="folder to write")
    add("--dtype", type=Literal["float32", "bfloat16"], help="of the weights on disk; by default the checkpoint's")
    add("--with_base_model", action="store_true", help="write a model folder that transformers opens by itself")
    add("--overwrite", action="store_true", help="replace an earlier export in that folder")
    add_trust_option(parser)
    return parser


def _summary_with_base_model(folder: Path) -> str:
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    return f"Wrote {folder}\nNext  model = {load}; model.generate(...)"


def _summary(folder: Path) -> str:
    sizes = {name: (folder / name).stat().st_size for name in EXPORTED_FILES}
    lines = [f"  {name:<28}{size / BYTES_PER_KILOBYTE:>10,.1f} kB" for name, size in sizes.items()]
    total = f"  {'':<28}{sum(sizes.values()) / BYTES_PER_KILOBYTE:>10,.1f} kB"
    command = f'python -m ptp_lightning generate --ckpt_path {shlex.quote(str(folder))} --prompt "def "'
    return "\n".join([f"Wrote {folder}", *lines, total, f"Next  {command}"])
