"""The command line: `python -m ptp_lightning COMMAND`."""

import os
import sys
from importlib import import_module

from ptp_lightning import __version__
from ptp_lightning.utils.short_help import TRAINING_COMMANDS, all_options, training_help, wants_help
from ptp_lightning.utils.user_errors import parsed_options, run_plainly

COMMANDS = dict.fromkeys(TRAINING_COMMANDS, "training.cli:run") | {
    "plan": "planning.options:run",
    "pregenerate": "pregeneration.options:run",
    "generate": "generation",
    "evaluate": "evaluation",
    "sweep": "sweeps.command:main",
    "export": "export",
}
"""Functions below `ptp_lightning`, or packages: `options.build_parser` reads the options of `command.run`.

Modules named `options` import no torch, so that `--help` is quick.
"""

CONFIGURED_COMMANDS = (*TRAINING_COMMANDS, "plan", "pregenerate", "sweep")
"""Those that read a configuration of their user, which may name classes in the current folder.

Not those that open somebody's adapter: it must not be able to name a file beside it.
"""

HELP = """usage: python -m ptp_lightning COMMAND [options]

  fit          train: --config gated_lora [--trainer.max_steps 100 ...] [--ckpt_path last.ckpt]
  validate     measure a checkpoint on the validation split: --config ... --ckpt_path P
  test         measure a checkpoint on the test split: --config ... --ckpt_path P
  plan         estimate the memory of a training step: --config ... [--gpus 8] [--memory 80GB] [--backbone 7b] [--json]
  pregenerate  sample completions of a teacher to train on: --config ... --output DIR [--self_prompted ...]
  generate     continue text: --prompt TEXT | --prompts FILE [--model NAME | --ckpt_path P] [--show_calls] [--html FILE]
  evaluate     compare decoders on a benchmark: --output DIR [--benchmark spec_bench --questions FILE] [--model NAME]
  sweep        run or report an ablation study: run losses [--full] [--jobs 2]
  export       write an adapter folder for PEFT: --ckpt_path P --output DIR [--dtype bfloat16] [--overwrite]

--config takes a file, or the name of one in configs/. Each command explains its options with --help.
--version prints the version."""


def main() -> None:
    """Run the command line; see `run_plainly` for errors."""
    run_plainly(dispatch)


def dispatch(args: list[str]) -> None:
    """Run the command `args[0]`, whose module is imported only now.

    Raises:
        ValueError: there is no such command.
    """
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    if args[0] in ("-V", "--version"):
        print(f"ptp_lightning {__version__}")
        return
    command, *rest = args
    if command not in COMMANDS:
        raise ValueError(f"expected one of the commands below, found {command!r}\n\n{HELP}")
    if command in TRAINING_COMMANDS:
        if wants_help(rest):
            print(training_help(command))
            return
        rest = [command, *all_options(rest)]  # LightningCLI parses the command too
    if command in CONFIGURED_COMMANDS and (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # classes that a configuration names; last, so that its files hide no package
    module, _, function = COMMANDS[command].partition(":")
    if function:
        getattr(import_module(f"ptp_lightning.{module}"), function)(rest)
        return
    options = parsed_options(command, import_module(f"ptp_lightning.{module}.options").build_parser(), rest)
    import_module(f"ptp_lightning.{module}.command").run(options)
