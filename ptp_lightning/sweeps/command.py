"""The commands `sweep run`, `sweep status` and `sweep report`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.named_files import find_yaml
from ptp_lightning.utils.user_errors import option_parser, parsed_options, status_of

if TYPE_CHECKING:
    from pathlib import Path

    from jsonargparse import ArgumentParser, Namespace

    from ptp_lightning.sweeps.study import Overrides, Study

CONFIGURATION_KEYS = ("trainer", "model", "data", "seed_everything")
BUDGET_KEYS = {"trainer.max_steps": "steps", "trainer.val_check_interval": "validations"}
"""Options that the budget of a study would replace, and their names there."""

HELP = """usage: python -m ptp_lightning sweep COMMAND STUDY [options]

  run     train the points of a study that are not trained yet, and report:
          gate_rank [--full] [--trials N] [--jobs K] [--output DIR] [--storage FILE_OR_URL]
          [--trainer.*, --model.*, --data.* as in fit, for all trials]
  status  one line on a study, also while it runs: done, running, waiting, failed, time left:
          gate_rank [--full] [--output DIR] [--storage FILE_OR_URL]
  report  write the tables and figures of the trained points:
          gate_rank [--full] [--output DIR] [--storage FILE_OR_URL] [--csv FILE] [--from_csv FILE]

STUDY is a file, or the name of one in sweeps/. The quick version of a study runs unless --full is given. The same
command continues a stopped study, and several processes share one. Each command explains its options with --help."""


def main(args: Sequence[str]) -> None:
    """Run `sweep ARGS`; Ctrl-C and SIGTERM end it in one line."""
    try:
        dispatch(args)
    except KeyboardInterrupt as stop:
        if os.environ.get("PTP_TRACEBACK"):
            raise
        print("Stopped. The same command continues.", file=sys.stderr)
        sys.exit(status_of(stop))


def dispatch(args: Sequence[str]) -> None:
    """Run the command `args[0]`; in another rank of a trial, train this trial."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        from ptp_lightning.sweeps.training_run import run_follower

        run_follower()
        return
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    command, *rest = args
    commands = {"run": run, "status": status, "report": report}
    if command not in commands:
        raise ValueError(f"expected run, status or report, found {command!r}\n\n{HELP}")
    commands[command](rest)


def run(args: Sequence[str]) -> None:
    """Train the points of a study that are not trained yet."""
    own, overrides = split_overrides(args)
    parser = _parser("run", "Train the points of a study that are not trained yet, and report.")
    parser.add_argument("--trials", type=int, help="train at most N points now; by default all")
    parser.add_argument("--jobs", type=int, default=1, help="processes on this machine that share the study")
    parser.add_argument("--retry_failed", action="store_true", help="train failed points again")
    options = parsed_options("run", parser, own)
    for name in ("trials", "jobs"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"expected --{name} >= 1, found {options[name]}")
    from ptp_lightning.sweeps.run import StudyRunner

    runner = StudyRunner(
        study_file=find_yaml(options.study, "sweeps"),
        full=options.full,
        output=None if options.output is None else str(local_path(options.output, "--output", WRITTEN)),
        storage=options.storage,
        overrides=overrides,
        retry_failed=options.retry_failed,
    )
    runner.run(options.trials, options.jobs)


def status(args: Sequence[str]) -> None:
    """Print one line on a study; reads only."""
    options = parsed_options("status", _parser("status", "Say how far a study is, also while it runs."), args)
    from ptp_lightning.sweeps.status import status_line
    from ptp_lightning.sweeps.storage import open_storage

    study, name, _, location = _study_at(options)
    print(f"{name}: {status_line(study, name, open_storage(location, create=False, read_only=True))}")


def report(args: Sequence[str]) -> None:
    """Write the tables and figures of the trained points."""
    parser = _parser("report", "Write the tables and figures of a study.")
    parser.add_argument("--csv", type=str, help="also write the results into this file")
    parser.add_argument("--from_csv", type=str, help="take the results from such a file instead of a storage")
    options = parsed_options("report", parser, args)
    import optuna

    from ptp_lightning.sweeps.report import write_report
    from ptp_lightning.sweeps.results_csv import read_csv, write_csv
    from ptp_lightning.sweeps.storage import load_stored, open_storage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, name, output, location = _study_at(options)
    written = None if options.csv is None else local_path(options.csv, "--csv", WRITTEN)
    if options.from_csv is not None:
        stored = read_csv(study, local_path(options.from_csv, "--from_csv"), name)
    else:
        stored = load_stored(name, open_storage(location, create=False))
    print(write_report(study, stored, output))
    if written is not None:
        write_csv(study, stored, written)


def _study_at(options: Namespace) -> tuple[Study, str, Path, str]:
    """The study that options name, its name, its folder, and the location of its storage."""
    from ptp_lightning.sweeps.run import default_output, journal_in
    from ptp_lightning.sweeps.study import load_study, study_name

    path = find_yaml(options.study, "sweeps")
    name = study_name(path, full=options.full)
    output = local_path(options.output or default_output(name), "--output", WRITTEN)
    return load_study(path, full=options.full), name, output, options.storage or journal_in(output)


def split_overrides(args: Sequence[str]) -> tuple[list[str], Overrides]:
    """Separate options of this command from overrides of the configuration.

    Raises:
        ValueError: an override without a value, or one that the budget of the study would replace.

    >>> split_overrides(["losses", "--full", "--model.init_args.seed", "3"])
    (['losses', '--full'], {'model.init_args.seed': '3'})
    """
    own: list[str] = []
    overrides: Overrides = {}
    rest = list(args)
    while rest:
        option = rest.pop(0)
        path, has_value, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or path.partition(".")[0] not in CONFIGURATION_KEYS:
            own.append(option)
            continue
        if path in BUDGET_KEYS:
            raise ValueError(
                f"expected no --{path}, which would have no effect: all trials of a study have its budget. Change "
                f"budget.{BUDGET_KEYS[path]} in its file, or in a copy of it"
            )
        if not has_value:
            if not rest:
                raise ValueError(f"expected a value after {option}, found none")
            value = rest.pop(0)
        overrides[path] = value
    return own, overrides


def _parser(command: str, description: str) -> ArgumentParser:
    parser = option_parser(f"sweep {command}", description)
    parser.add_argument("study", type=str, help="file, or name of one in sweeps/")
    parser.add_argument("--full", action="store_true", help="the full version instead of the quick one")
    parser.add_argument("--output", type=str, help="folder of the study; by default runs/sweeps/NAME")
    parser.add_argument(
        "--storage", type=str, help="journal file or database URL; by default a file in the output folder"
    )
    return parser
