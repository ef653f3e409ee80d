"""The command line: `python -m ptp_lightning COMMAND`."""

from importlib import import_module

from ptp_lightning.utils.user_errors import run_plainly

TRAINING_COMMANDS = ("fit", "validate", "test")  # of LightningCLI, which parses the command too
COMMANDS = dict.fromkeys(TRAINING_COMMANDS, "training.cli:run") | {
    "plan": "planning.command:run",
    "pregenerate": "pregeneration.command:run",
    "generate": "decoding.command:run",
    "evaluate": "evaluation.command:run",
    "sweep": "sweeps.command:main",
    "export": "export.command:run",
}
"""Modules and functions below `ptp_lightning`."""

HELP = """usage: python -m ptp_lightning COMMAND [options]

  fit          train: --config gated_lora [--trainer.max_steps 100 ...] [--ckpt_path last.ckpt]
  validate     measure a checkpoint on the validation split: --config ... --ckpt_path P
  test         measure a checkpoint on the test split: --config ... --ckpt_path P
  plan         estimate the memory of a training step: --config ... [--gpus 8] [--memory 80GB] [--backbone 7b] [--json]
  pregenerate  sample completions of a teacher to train on: --config ... --output DIR [--self_prompted ...]
  generate     continue text: --prompt TEXT | --prompts FILE [--model NAME | --ckpt_path P] [--temperature 0.7 ...]
  evaluate     compare decoders on a benchmark: --output DIR [--benchmark spec_bench --questions FILE] [--model NAME]
  sweep        run or report an ablation study: run losses [--full] [--jobs 2]
  export       write an adapter folder for PEFT: --ckpt_path P --output DIR [--dtype bfloat16] [--overwrite]

--config takes a file, or the name of one in configs/. Each command explains its options with --help."""


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
    command, *rest = args
    if command not in COMMANDS:
        raise ValueError(f"expected one of the commands below, found {command!r}\n\n{HELP}")
    module, function = COMMANDS[command].split(":")
    run = getattr(import_module(f"ptp_lightning.{module}"), function)
    run(args if command in TRAINING_COMMANDS else rest)
