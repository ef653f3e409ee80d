"""The LightningCLI of fit, validate and test, and of other commands that read the same configurations."""

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from os.path import exists, isdir, isfile
from typing import Any, NoReturn, TypeVar

import torch
import yaml
from jsonargparse import set_parsing_settings
from jsonargparse.typing import register_type
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, OnExceptionCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ptp_lightning.export.hub import hub_id
from ptp_lightning.training.callbacks import RunSettings, RunSummary, StepProgressBar, ValidatedCheckpoint
from ptp_lightning.training.callbacks.known_monitors import KnownMonitors, unknown_monitor
from ptp_lightning.training.class_names import unknown_class
from ptp_lightning.training.disk_errors import plain_disk_errors
from ptp_lightning.training.distributed.termination import TerminateTogether
from ptp_lightning.training.hyperparameters import flat_settings
from ptp_lightning.training.run_folder import SaveRunConfig, newest_checkpoint, require_writable_folders
from ptp_lightning.training.settings import (
    leaves,
    require_resumable,
    require_sections,
    require_trainer_settings,
    require_whole_interval,
)
from ptp_lightning.utils.named_files import find_yaml
from ptp_lightning.utils.renamed_keys import require_current_names
from ptp_lightning.utils.user_errors import EXIT_CODE, TERMINATED, plain_reason, status_of

TRAINER_DEFAULTS: dict[str, Any] = {
    "precision": "32-true",
    "gradient_clip_val": 1.0,
    "val_check_interval": 250,
    "check_val_every_n_epoch": None,  # training streams have no epochs
    "num_sanity_val_steps": -1,  # a complete validation before the first step, to compare the last one with
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "logger": {
        "class_path": "ptp_lightning.training.loggers.OverviewTensorBoardLogger",
        "init_args": {"save_dir": "runs", "default_hp_metric": False},
    },
    "callbacks": [
        {"class_path": "ptp_lightning.training.callbacks.StepProgressBar"},
        {"class_path": "ptp_lightning.training.callbacks.LogProgress"},
        {"class_path": "ptp_lightning.training.callbacks.LearningRate"},
        {"class_path": "ptp_lightning.training.callbacks.TrainingSpeed"},
        {"class_path": "ptp_lightning.training.callbacks.PositionCharts"},
        {"class_path": "ptp_lightning.training.callbacks.RunText"},
        {"class_path": "ptp_lightning.training.callbacks.FinalMetrics"},
        {"class_path": "ptp_lightning.training.callbacks.RunSummary"},
    ],
    "plugins": {"class_path": "ptp_lightning.training.distributed.checkpoint_io.AtomicCheckpointIO"},
}
"""Of the keys below `trainer`. `callbacks` in a configuration replaces the list, `callbacks+` adds to it."""

RUNS_FOLDER = "runs"
"""Where runs write whose logger has no folder; Lightning takes the current one."""

logger = logging.getLogger(__name__)

_UNKNOWN_METRIC = re.compile(r"Early stopping conditioned on metric `(.*)` which is not available\.")  # of Lightning

_UNWANTED = re.compile("litlogger|litmodels|^An (KeyboardInterrupt|SIGTERMException) was raised with message")

CONFIG_OPTIONS = ("-c", "--config")

CHECKPOINT_DEFAULTS: dict[str, Any] = {
    "save_last": True,
    "save_top_k": 0,
    "save_on_exception": True,
    "every_n_train_steps": "${..trainer.val_check_interval}",
}
"""Of the keys below `checkpoint`, the arguments of Lightning's `ModelCheckpoint`, see `ValidatedCheckpoint`."""


class PlainErrorParser(LightningArgumentParser):
    """A parser that reports errors without the list of all options.

    Attributes:
        command: the command whose --help lists the options.
    """

    command = "fit"

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """See `ArgumentParser.parse_args`.

        For arguments of a class jsonargparse calls this again. It writes `null` as `None` then, and takes it for text.
        """
        if args is not None:
            args = [f"{arg.removesuffix('None')}null" if arg.endswith("=None") else arg for arg in args]
        return super().parse_args(args, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the reason and the command for help, and exit with status 2."""
        print(f"error: {unknown_class(message) or plain_reason(message)}", file=sys.stderr)
        print(f"tip: python -m ptp_lightning {self.command} --help lists the options", file=sys.stderr)
        sys.exit(EXIT_CODE)


class TrainingCLI(LightningCLI):
    """LightningCLI with the defaults of this package.

    `checkpoint` holds the arguments of a `ValidatedCheckpoint`, which is used unless `trainer.callbacks` has a
    checkpoint callback itself or `trainer.enable_checkpointing` is false. `--print_config` shows all defaults.

    Attributes:
        logs_settings: whether loggers get all settings of a training.
    """

    logs_settings = True

    def __init__(self, *classes: Any, args: list[str], **options: Any) -> None:
        self._command = args[0] if args else None
        super().__init__(*classes, args=args, **options)

    def subcommands(self) -> dict[str, set[str]]:
        """The command that is run; building the parsers of the other ones would take longer than parsing."""
        commands = super().subcommands()
        return {name: skipped for name, skipped in commands.items() if name == self._command} or commands

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `trainer`, `model`, `data` and `checkpoint`."""
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults({"trainer.callbacks": TRAINER_DEFAULTS["callbacks"]})
        parser.add_class_arguments(ValidatedCheckpoint, "checkpoint")
        parser.set_defaults({f"checkpoint.{name}": value for name, value in CHECKPOINT_DEFAULTS.items()})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """See `LightningCLI.init_parser`; abbreviated options are refused, which may come to mean others."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Measurements show the summary of a training instead of Lightning's list of all keys, see `RunSummary`."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})
        return parser

    def before_instantiate_classes(self) -> None:
        """Check the trainer's settings before the model is built."""
        require_trainer_settings(self._get(self.config, "trainer"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the `ValidatedCheckpoint`; remove callbacks that need a progress bar or a logger where there is none.

        The lines of `LogProgress` stay without a progress bar: they are for output that has no terminal.
        """
        trainer: Any = self._get(self.config_init, "trainer")
        callbacks = trainer.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if trainer.logger is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        if trainer.enable_progress_bar is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        if sum(isinstance(callback, ProgressBar) for callback in callbacks) > 1:  # one that is added replaces ours
            callbacks = [callback for callback in callbacks if not isinstance(callback, StepProgressBar)]
        # A fast_dev_run has no folder of its own: its checkpoint would be written into the current one.
        stores = trainer.enable_checkpointing is not False and not trainer.fast_dev_run
        # OnExceptionCheckpoint writes no file of a training that goes well.
        if stores and all(
            isinstance(one, OnExceptionCheckpoint) or not isinstance(one, Checkpoint) for one in callbacks
        ):
            callbacks.insert(0, self._get(self.config_init, "checkpoint"))
        if self.logs_settings:
            config = self.config if self.subcommand is None else self.config[self.subcommand]
            callbacks.append(RunSettings(flat_settings(config.as_dict())))
        folder = trainer.default_root_dir or RUNS_FOLDER
        return super().instantiate_trainer(**{"callbacks": callbacks, "default_root_dir": folder} | kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Replace `ckpt_path: last` by a file.

        Raises:
            ValueError: `ckpt_path` is a folder or a repository of the hub, or there is nothing to validate or test.
        """
        options = super()._prepare_subcommand_kwargs(subcommand)
        path = options.get("ckpt_path")
        callbacks: list[Callback] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if subcommand != "fit" and not any(isinstance(callback, RunSummary) for callback in callbacks):
            options["verbose"] = True
        if path is None and subcommand != "fit":
            logger.warning("note: without ckpt_path this measures an untrained model; last is that of the newest run")
        if path == "last":
            newest = newest_checkpoint(self.trainer)
            if newest is None and subcommand != "fit":
                raise ValueError("expected an earlier run for ckpt_path last, found none: set ckpt_path to a file")
            logger.info("No earlier run: starting anew" if newest is None else f"Resuming from {newest}")
            options["ckpt_path"] = path = None if newest is None else str(newest)
        elif path is not None and isdir(path):
            raise ValueError(
                f"expected a checkpoint file, found the folder {path}: set ckpt_path (exported folders serve generate, "
                "evaluate and from_pretrained)"
            )
        elif path is not None and hub_id(path) is not None and not exists(path):
            raise ValueError(
                f"expected a checkpoint file of fit for {subcommand}, found no file {path}: set ckpt_path "
                "(repositories of the hub and exported folders serve generate, evaluate and export)"
            )
        if subcommand == "fit" and path is not None:
            require_resumable(callbacks)
        return options

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; errors of the disk name the folder of the run.

        Raises:
            ValueError: a training cannot write its folders.
        """
        if subcommand == "fit":
            require_writable_folders(self.trainer)
        with plain_disk_errors(self.trainer):
            super()._run_subcommand(subcommand)

    def _dump_config(self) -> None:
        """Store the parsed values, as in Lightning, without a second validation, which takes as long as the first."""
        if hasattr(self, "config_dump"):
            return
        options = {"skip_link_targets": False, "skip_unset": False, "skip_validation": True, "format": "yaml"}
        config = yaml.safe_load(self.parser.dump(self.config, **options))
        self.config_dump = config if self.subcommand is None else config[self.subcommand]

    def _parse_ckpt_path(self) -> None:
        """Do nothing; in Lightning the checkpoint's hyperparameters override the command line."""


class StandardErrorHandler(logging.StreamHandler):
    """Writes to the present standard error, which notebooks and tests replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self.stream = sys.stderr
        super().emit(record)


AnyCLI = TypeVar("AnyCLI", bound=TrainingCLI)


def run(args: list[str] | None = None) -> None:
    """Run `fit`, `validate` or `test`; `args` are by default those of the command line."""
    show_own_messages()
    try:
        parsed(TrainingCLI, PlainErrorParser, args)
    except MisconfigurationException as error:
        raise ValueError(f"{' '.join(str(error).split())}: change the settings of trainer") from error
    except RuntimeError as error:
        if not (metric := _UNKNOWN_METRIC.match(str(error))):
            raise
        names = re.findall(r"`([^`]+)`", str(error)[metric.end() :])
        raise ValueError(unknown_monitor("EarlyStopping", metric[1], names)) from error
    except SIGTERMException:
        sys.exit(TERMINATED)
    except SystemExit as end:
        if isinstance(stop := end.__context__, KeyboardInterrupt):  # Lightning's status is 1
            sys.exit(status_of(stop))
        raise
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _leave_together()


def parsed(
    cli_class: type[AnyCLI], parser_class: type[PlainErrorParser], args: list[str] | None, **options: Any
) -> AnyCLI:
    """Parse the arguments of a command that reads the configuration of a run.

    Args:
        cli_class: the CLI of the command.
        parser_class: its parser.
        args: by default those of the command line.
        **options: further options of the CLI.

    Raises:
        ValueError: a key or a class path of version 0.1.
    """
    args = [*sys.argv[1:]] if args is None else args
    require_current_names(options_of(args), "command line")
    require_sections(options_of(args), "command line")
    found_args, settings = with_found_configs(args)
    require_whole_interval(settings | dict(leaves(options_of(args))))
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    silence_library_noise()
    # Of defaults such as that of StochasticWeightAveraging; jsonargparse knows only types that are registered.
    register_type(torch.device, str, torch.device, fail_already_registered=False)
    # Of defaults such as that of Timer; YAML knows no enumerations.
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
    options.setdefault("save_config_callback", SaveRunConfig)
    return cli_class(
        LightningModule,
        LightningDataModule,
        trainer_class=Trainer,
        trainer_defaults=TRAINER_DEFAULTS | {"callbacks": [TerminateTogether(), KnownMonitors()]},
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        parser_kwargs={"parser_mode": "omegaconf+"},
        parser_class=parser_class,
        args=found_args,
        **options,
    )


def with_found_configs(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments whose `--config NAME` are the paths of files, see `find_yaml`, and dotted keys and values of the files.

    Raises:
        ValueError: a file has names of version 0.1.
    """
    found, settings = list(args), dict[str, Any]()
    for k, argument in enumerate(args):
        option, has_value, value = argument.partition("=")
        if option not in CONFIG_OPTIONS or not (has_value or k + 1 < len(args)):
            continue
        path = find_yaml(value if has_value else args[k + 1], "configs")
        if isfile(path):
            with suppress(yaml.YAMLError):  # reported by the parser
                config = yaml.safe_load(path.read_text(encoding="utf-8"))
                config = config if isinstance(config, dict) else {}
                require_current_names(config, str(path))
                require_sections(config, str(path))
                settings |= dict(leaves(config))
            if has_value:
                found[k] = f"{option}={path}"
            else:
                found[k + 1] = str(path)
    return found, settings


def options_of(args: Sequence[str]) -> dict[str, Any]:
    """Options with dotted keys and their values, structured ones parsed.

    >>> options_of(["fit", "--model.init_args.seed", "3", "--data={class_path: a.B}"])
    {'model.init_args.seed': '3', 'data': {'class_path': 'a.B'}}
    """
    options: dict[str, Any] = {}
    for option, following in zip(args, [*args, ""][1:], strict=True):
        if not option.startswith("--"):
            continue
        key, has_value, value = option.removeprefix("--").partition("=")
        text = value if has_value else following
        options[key] = text
        if text.startswith(("{", "[")):
            with suppress(yaml.YAMLError):
                options[key] = yaml.safe_load(text)
    return options


def _leave_together() -> None:
    """Close gloo's connections on all processes together: a process that loses a connection at its end may be aborted.

    Lightning closes those of nccl.
    """
    if torch.distributed.get_backend() == "gloo":
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def silence_library_noise() -> None:
    """Hide warnings about choices that are correct here and that a user cannot change."""
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning against the newest torch
        r"The '\w+_dataloader' does not have many workers",  # the stream costs far less than a step
        r"LightningCLI's args parameter is intended",  # the command's name is not one of its arguments
        r"Trying to infer the `batch_size` from an ambiguous collection",
        r"Be aware that when using `ckpt_path`, callbacks",  # a measurement needs no callback of the training
        r"It is recommended to use `self.log\('(val|test)/",  # metrics are already summed over all processes
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning's tips and reports go through this logger; a filter that is there already is not added again.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_wanted)


def show_own_messages() -> None:
    """Print what this package logs, such as the attention back-end in use, on the first process alone."""
    logger = logging.getLogger("ptp_lightning")
    if rank_zero_only.rank == 0 and not logger.handlers:
        logger.addHandler(StandardErrorHandler())
        logger.setLevel(logging.INFO)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Neither an advertisement, nor the second line on a stop, which `RunSummary` reports."""
    return not _UNWANTED.search(record.getMessage())
