"""The reference pages that follow from the code: options of commands, keys of configurations, public names.

`python docs/generated_reference.py PAGE` prints the Markdown of `command_line`, `configuration` or `api`. Sphinx puts
it in the place of the line `<!-- generated: PAGE -->`, see `conf.py`.
"""

from __future__ import annotations

import inspect
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest.mock import patch

from jsonargparse import ArgumentParser, Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ptp_lightning import cli
from ptp_lightning.sweeps import command as sweep_command
from ptp_lightning.training.cli import CHECKPOINT_DEFAULTS, TRAINER_DEFAULTS

OF_CONFIGURATIONS = re.compile(r"(trainer|model|data|checkpoint|optimizer|lr_scheduler)\b")
"""Options of commands that are keys of configurations, too."""

PACKAGES = (
    "ptp_lightning",
    "ptp_lightning.auxiliary",
    "ptp_lightning.sampling",
    "ptp_lightning.models",
    "ptp_lightning.losses",
    "ptp_lightning.auxiliary_strategies",
    "ptp_lightning.training",
    "ptp_lightning.data",
    "ptp_lightning.decoding",
    "ptp_lightning.evaluation",
    "ptp_lightning.testing",
)
"""Whose public names the Python API lists, each where it is found first."""

KINDS = (
    ("model", "ptp_lightning.training", "TrainingModule"),
    ("data", "ptp_lightning.data", "PackedDataModule"),
    ("model.init_args.predictor.objective", "ptp_lightning.models", "Objective"),
    ("model.init_args.predictor.features", "ptp_lightning.models", "AuxiliaryFeatures"),
    ("model.init_args.predictor.correction", "ptp_lightning.models", "Correction"),
    ("model.init_args.predictor.student", "ptp_lightning.models", "Student"),
    ("model.init_args.predictor.sampling_range", "ptp_lightning.models", "SamplingRange"),
    ("model.init_args.loss", "ptp_lightning.losses", "Loss"),
    ("model.init_args.position_weights", "ptp_lightning.losses", "PositionWeights"),
    ("model.init_args.source", "ptp_lightning.training", "WindowSource"),
    ("model.init_args.source.init_args.strategy", "ptp_lightning.auxiliary_strategies", "AuxiliaryStrategy"),
    ("data.init_args.corpus", "ptp_lightning.data", "Corpus"),
    ("data.init_args.series", "ptp_lightning.data", "Series"),
    ("data.init_args.parts", "ptp_lightning.data", "StreamPart"),
    ("data.init_args.parts.source", "ptp_lightning.data", "RowSource"),
    ("data.init_args.parts.rendering", "ptp_lightning.data", "Rendering"),
    ("trainer.strategy", "ptp_lightning.training", "FullyShardedStrategy"),
)
"""Keys whose value is a class, the package that exports such classes, and their base."""


class ParserFound(BaseException):
    """Carries a command's parser out of the command; no handler of errors of the command may stop it."""

    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser


def command_line() -> str:
    """Each command with a table of its options."""
    commands: list[tuple[str, ...]] = []
    for name in cli.COMMANDS:
        subcommands = re.findall(r"^  (\w+)  ", sweep_command.HELP, re.MULTILINE) if name == "sweep" else []
        commands += [(name, subcommand) for subcommand in subcommands] or [(name,)]
    parts = [f"```text\n{cli.HELP}\n```"]
    for words in commands:
        parser = parser_of(words)
        rows = [row for row in options(parser) if not OF_CONFIGURATIONS.match(row[0].strip("`").lstrip("-"))]
        parts += [f"## `{' '.join(words)}`", description_of(words, parser), table("option", rows)]
        if words[0] in (*cli.TRAINING_COMMANDS, "plan", "pregenerate"):
            parts.append(
                "All keys of a [configuration](configuration.md) are options as well: `--trainer.max_steps 100`."
            )
    return "\n\n".join(filter(None, parts))


def configuration() -> str:
    """Each key of a configuration with its type, default and meaning."""
    parts = []
    for key, package, base in KINDS:
        parts.append(f"## `{key}`")
        for cls in implementations(package, base):
            parser = ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(cls, None)
            rows = [row for row in options(parser) if row[0] != "`--help`"]
            parts += [f"### `{package}.{cls.__name__}`", first_paragraph(cls)]
            parts.append(table("key below `init_args`", rows) if rows else "No arguments.")
    for name, cls, defaults in (
        ("trainer", Trainer, TRAINER_DEFAULTS),
        ("checkpoint", ModelCheckpoint, CHECKPOINT_DEFAULTS),
    ):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, name)
        rows = [
            (key, as_code(default_of(defaults[short])) if short in defaults else default, text)
            for key, default, text in options(parser)
            if (short := key.strip("`").removeprefix(f"--{name}.")) and key != "`--help`"
        ]
        parts += [f"## `{name}`", f"The arguments of Lightning's `{cls.__name__}`.", table("key", rows)]
    parts += ["## `seed_everything`", "The seed of Python, NumPy and torch. 0 by default."]
    return "\n\n".join(parts).replace("| `--", "| `")


def api() -> str:
    """Directives of autodoc for all public names."""
    parts, seen = [], set()
    for package in PACKAGES:
        module = import_module(package)
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", None) == package
        ]
        directives = []
        for name in names:
            value = getattr(module, name)
            if name.startswith("_") or id(value) in seen or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            seen.add(id(value))
            kind = "autoclass" if inspect.isclass(value) else "autofunction"
            members = "\n   :members:" if kind == "autoclass" else ""
            directives.append(f".. {kind}:: {package}.{name}{members}")
        if directives:
            body = "\n\n".join(directives)
            parts.append(f"## `{package}`\n\n```{{eval-rst}}\n{body}\n```")
    return "\n\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {"command_line": command_line, "configuration": configuration, "api": api}


def parser_of(words: tuple[str, ...]) -> ArgumentParser:
    """The parser of a command, at the moment at which it would read the arguments."""

    def found(parser: ArgumentParser, *_: Any, **__: Any) -> None:
        raise ParserFound(parser)

    with patch.object(ArgumentParser, "parse_args", found):
        try:
            cli.dispatch([*words])
        except ParserFound as carrier:
            parser = carrier.parser
        else:
            raise ValueError(f"expected {' '.join(words)} to parse its arguments, found that it does not")
    for action in parser._actions:
        if isinstance(action.choices, dict) and words[0] in action.choices:  # LightningCLI's subcommands
            return action.choices[words[0]]
    return parser


def description_of(words: tuple[str, ...], parser: ArgumentParser) -> str:
    """What a command does; Lightning's words are those of any Lightning program."""
    found = re.search(rf"^  {words[0]} +(.*?)(:|$)", cli.HELP, re.MULTILINE)
    return _sentence(f"{found[1]}." if found and len(words) == 1 else parser.description)


def implementations(package: str, base: str) -> Iterator[type]:
    """The classes in a package that can be chosen, by name."""
    values = {name: value for name, value in vars(import_module(package)).items() if inspect.isclass(value)}
    for name in sorted(values):
        if issubclass(values[name], values[base]) and not inspect.isabstract(values[name]):
            yield values[name]


def options(parser: ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of the options of a parser."""
    for action in parser._actions:
        if action.default is SUPPRESS or action.help is SUPPRESS or action.dest == "help":
            continue
        required = action.required or not action.option_strings or action.dest in getattr(parser, "required_args", ())
        name = max(action.option_strings, key=len, default=action.dest).removesuffix("+")
        default = "required" if required else as_code(default_of(action.default))
        yield f"`{name}`", default, _sentence(action.help)


def default_of(value: Any) -> str:
    """A default as YAML writes it on one line."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict) and set(value) <= {"class_path", "init_args"} and value:
        arguments = ", ".join(f"{key}: {default_of(item)}" for key, item in value.get("init_args", {}).items())
        return value["class_path"] + (f" with {arguments}" if arguments else "")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {default_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(default_of, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def as_code(text: str) -> str:
    """Inline code, in a cell of a table."""
    return f"`{text}`".replace("|", "\\|") if text else "empty"


def table(title: str, rows: list[tuple[str, str, str]]) -> str:
    """A table of options."""
    return "\n".join([f"| {title} | default | meaning |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def first_paragraph(cls: type) -> str:
    """What a class is, from its docstring."""
    return _sentence((inspect.getdoc(cls) or "").split("\n\n")[0])


def _sentence(text: str | None) -> str:
    """Text of a docstring as one line of Markdown."""
    line = " ".join((text or "").replace("%%", "%").split())
    line = line.replace("|", "\\|").replace("<", "\\<").replace("``", "`")
    return line[:1].upper() + line[1:]


if __name__ == "__main__":
    print(PAGES[sys.argv[1]]())
