"""Help and version: at once, on one screen, and true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ptp_lightning
from ptp_lightning.sweeps.training_run import ParsingCLI
from ptp_lightning.training.cli import PlainErrorParser, parsed
from ptp_lightning.utils.short_help import TRAINING_COMMANDS, training_help
from tests.helpers.command_output import run_in_process

ROOT = Path(__file__).parents[2]
HELP_LINES = 24
HELP_COLUMNS = 120
COMMANDS = ["generate", "evaluate", "export", "plan", "pregenerate", "sweep", "fit", "validate", "test"]
PRINT_HELP = """
import sys
from ptp_lightning.cli import dispatch
for command in {commands}:
    try:
        dispatch([*command.split(), "--help"])
    except SystemExit:
        pass
slow = {{"torch", "lightning", "transformers"}} & sys.modules.keys()
assert not slow, slow
"""


def test_help_imports_no_slow_library() -> None:
    program = PRINT_HELP.format(commands=["", *COMMANDS, "sweep run"])
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(COMMANDS) + 2


@pytest.mark.parametrize("command", TRAINING_COMMANDS)
def test_help_of_a_training_fits_a_screen(command: str) -> None:
    lines = training_help(command).splitlines()
    assert len(lines) <= HELP_LINES and max(map(len, lines)) <= HELP_COLUMNS
    for way in ("--print_config ", "--model.help ", "--help_all "):
        assert f"\n  {way}" in training_help(command)


def test_options_in_the_help_of_a_training_exist() -> None:
    """All lines that have a value, parsed together."""
    _, _, examples = training_help("fit").partition("each\nsetting")
    examples = examples.partition("All settings:")[0]
    options = [option for option in re.findall(r"(--[\w.+]+ [\w./:-]+)", examples) if "--ckpt_path" not in option]
    assert len(options) >= 12
    cli = parsed(ParsingCLI, PlainErrorParser, [arg for option in options for arg in shlex.split(option)], run=False)
    config = cli.config.as_dict()
    assert config["trainer"]["max_steps"] == 500 and config["data"]["init_args"]["batch_size"] == 4


def test_all_options_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_in_process(monkeypatch, capsys, "plan", "--help_all")
    assert output.status == 0
    assert "--trainer.max_steps" in output.out and "--memory" in output.out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_in_process(monkeypatch, capsys, "--version")
    assert (output.status, output.out) == (0, f"ptp_lightning {ptp_lightning.__version__}\n")
