"""Help of commands that read a configuration: one screen, printed without importing Lightning, and how to see the rest.

The parser of such a command has several hundred options, one for each setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

ALL_OPTIONS = "--help_all"

TRAINING_COMMANDS = {
    "fit": "Train a predictor.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
}
"""With descriptions."""

_OF_TRAINING = """usage: python -m ptp_lightning {command} --config NAME_OR_FILE [--config ...] [options]

{description}
A configuration is a file, or the name of one in configs/. Later files and options replace earlier settings; each
setting is an option too.

  --config gated_lora --config strategy/ddp   several files
  --ckpt_path FILE                            {ckpt_path}
  --seed_everything 1                         another seed
  --trainer.max_steps 500                     length; also --trainer.max_time 00:08:00:00
  --trainer.accelerator cpu                   also --trainer.devices 8, --trainer.precision bf16-mixed
  --trainer.logger CSVLogger --trainer.logger.save_dir runs    also --trainer.logger false
  --trainer.callbacks+ DeviceStatsMonitor     another callback; callbacks without + replaces the default ones
  --checkpoint.every_n_train_steps 20         another period of checkpoints
  --model.predictor.backbone.path PATH        folder, .gguf file or hub id of the base model
  --data.batch_size 4                         rows of a step on each device

All settings:
"""
_REST = f"""  --print_config                              of a configuration, with their defaults, as YAML
  --model.help DistillationModule             of a class, explained; also --data.help CorpusDataModule,
                                              --trainer.logger.help CLASS, --trainer.callbacks.help CLASS
  {ALL_OPTIONS:<42}  of the command, several hundred lines"""
_CKPT_PATH = {"fit": "continue a training; last is the newest run of that name"}


def wants_help(args: Sequence[str]) -> bool:
    """Whether the arguments ask for a command's short help.

    >>> wants_help(["--help"]), wants_help(["--model.help", "DistillationModule"])
    (True, False)
    """
    return any(arg in ("-h", "--help") for arg in args)


def all_options(args: Sequence[str]) -> list[str]:
    """The arguments as the command's parser knows them, which prints all its options for `--help`.

    >>> all_options(["fit", "--help_all"])
    ['fit', '--help']
    """
    return ["--help" if arg == ALL_OPTIONS else arg for arg in args]


def training_help(command: str) -> str:
    """Help of `fit`, `validate` or `test`."""
    ckpt_path = _CKPT_PATH.get(command, "what to measure; last is the newest run of that name")
    return _OF_TRAINING.format(command=command, description=TRAINING_COMMANDS[command], ckpt_path=ckpt_path) + _REST


def configured_help(command: str, description: str, add_options: Callable[[ArgumentParser], None]) -> str:
    """Help of a command that reads the configurations of `fit` and has options of its own.

    Args:
        command: its name.
        description: what it does, as a sentence.
        add_options: adds its own options to a parser.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"python -m ptp_lightning {command} --config NAME_OR_FILE",
        description=f"{description} All settings of a configuration are options too, as in fit.",
    )
    add_options(parser)
    return f"{parser.format_help()}\nSettings of the configuration:\n{_REST}"
