"""The command line: one entry for every job."""

from ptp_lightning.utils.user_errors import run_plainly

TRAINING_COMMANDS = ("fit", "validate", "test")

HELP = """usage: python -m ptp_lightning COMMAND [options]

  fit          train:   --config gated_lora [--trainer.max_steps 100 ...] [--ckpt_path last.ckpt]
  validate     measure a checkpoint on the validation split: --config ... --ckpt_path P
  test         the same on the test split
  plan         say what memory a training step needs: --config ... [--gpus 8] [--memory 80GB] [--backbone 7b] [--json]
  pregenerate  let the teacher complete prompts, to train from: --config ... --output DIR [--num_completions 4 ...]
  generate     continue text: --prompt TEXT | --prompts FILE [--ckpt_path P] [--temperature 0.7 ...] [--json]
  evaluate     compare decoders on a benchmark: --output DIR [--benchmark spec_bench --questions FILE] [--ckpt_path P]
  sweep        run or report an ablation study: run losses [--full] [--jobs 2]
  export       write a folder that PEFT opens: --ckpt_path P --output DIR [--dtype bfloat16] [--overwrite]

Each command explains its options with --help."""


def main() -> None:
    """Run the command that the first argument of the command line names; see `run_plainly` for how errors end."""
    run_plainly(dispatch)


def dispatch(args: list[str]) -> None:
    """Run the command that `args[0]` names."""
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    command = args[0]
    if command in TRAINING_COMMANDS:
        from ptp_lightning.training.cli import run

        run()
        return
    if command == "plan":
        from ptp_lightning.planning.command import run

        run(args[1:])
        return
    if command == "pregenerate":
        from ptp_lightning.pregeneration.command import run

        run(args[1:])
        return
    if command == "generate":
        from ptp_lightning.decoding.command import run

        run(args[1:])
        return
    if command == "evaluate":
        from ptp_lightning.evaluation.command import run

        run(args[1:])
        return
    if command == "export":
        from ptp_lightning.export.command import run

        run(args[1:])
        return
    if command == "sweep":
        from ptp_lightning.sweeps.command import main as sweep

        sweep(args[1:])
        return
    raise ValueError(f"expected one of the commands below, found {command!r}\n\n{HELP}")
