"""The options of `export`, and those of all commands that open a predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ptp_lightning.export.packaged_adapters import DEFAULT_ADAPTER, PACKAGED_ADAPTERS
from ptp_lightning.option_names import TRUST_OPTION, DtypeName
from ptp_lightning.utils.user_errors import option_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def build_parser() -> ArgumentParser:
    """The parser of all options."""
    parser = option_parser(
        "export",
        "Write a trained predictor, without base weights, as a folder that PEFT and ptp_lightning open.",
    )
    add = parser.add_argument
    add("--ckpt_path", type=str, required=True, help="Lightning checkpoint, an earlier export, or user/name of the hub")
    add("--output", type=str, required=True, help="folder to write")
    add("--base", type=str, help="hub id, folder or .gguf file to write as the base model")
    add("--dtype", type=Literal["float32", "bfloat16"], help="of the weights on disk; by default the checkpoint's")
    add("--with_base_model", action="store_true", help="write a model folder that transformers opens by itself")
    add("--license", type=str, help="for the model card, as the hub names it: apache-2.0, mit, ..")
    add("--overwrite", action="store_true", help="replace an earlier export in that folder")
    add_trust_option(parser)
    return parser


def add_predictor_options(parser: ArgumentParser) -> None:
    """Add `--model`, `--ckpt_path`, `--base`, `--dtype` and `--trust_custom_classes`."""
    add = parser.add_argument
    add(
        "--model",
        type=Literal[tuple(PACKAGED_ADAPTERS)],
        help=f"an adapter that ships with the package; {DEFAULT_ADAPTER} if there is no --ckpt_path either",
    )
    add(
        "--ckpt_path",
        type=str,
        help="Lightning checkpoint, exported folder or user/name of the hub, instead of --model",
    )
    add("--base", type=str, help="folder, .gguf file or hub id of a sibling of the base model to use instead of it")
    add("--dtype", type=DtypeName, default="auto", help="of the base model; auto is that of the training")
    add_trust_option(parser)


def add_draft_options(parser: ArgumentParser) -> None:
    """Add `--window_length` and `--num_draft_tokens`."""
    add = parser.add_argument
    add("--window_length", type=int, help="tokens drafted per cycle; by default as in training")
    add(
        "--num_draft_tokens",
        type=int,
        help="drafted tokens that a cycle verifies, alternatives included; 0 for a single draft",
    )


def add_trust_option(parser: ArgumentParser) -> None:
    """Add `--trust_custom_classes`."""
    text = "import classes that the checkpoint names outside of ptp_lightning, which runs their code"
    parser.add_argument(f"--{TRUST_OPTION}", action="store_true", help=text)


def predictor_source(options: Namespace) -> str | None:
    """What `load_network` opens for the options; None for its default.

    Raises:
        ValueError: both `--model` and `--ckpt_path` are given.
    """
    if options.model is not None and options.ckpt_path is not None:
        raise ValueError(
            f"expected one of --model and --ckpt_path, found both ({options.model}, {options.ckpt_path}): leave one out"
        )
    return options.model if options.ckpt_path is None else options.ckpt_path


def predictor_options(options: Namespace) -> dict[str, Any]:
    """The other arguments of `load_network`."""
    return {name: options[name] for name in ("dtype", "base", TRUST_OPTION)}
