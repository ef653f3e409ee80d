"""`import ptp_lightning` is quick, and every public name is there when it is asked for."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ptp_lightning

ROOT = Path(__file__).parents[2]
IMPORT_SECONDS = 0.5


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; begin = time.process_time(); import ptp_lightning; seconds = time.process_time() - begin\n"
        "dir(ptp_lightning), ptp_lightning.__version__\n"
        "heavy = {'torch', 'transformers', 'lightning', 'peft', 'numpy', 'datasets'} & sys.modules.keys()\n"
        "print(seconds, *heavy)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    seconds, *heavy = printed.split()
    assert float(seconds) < IMPORT_SECONDS
    assert heavy == []


def test_command_line_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ptp_lightning.cli import main; sys.argv = ['ptp_lightning', '--help']; main()\n"
        "assert not {'torch', 'transformers', 'lightning'} & sys.modules.keys()"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for command in ("fit", "validate", "test", "pregenerate", "generate", "export"):
        assert f"\n  {command} " in printed


@pytest.mark.parametrize("name", ptp_lightning.__all__)
def test_every_public_name(name: str) -> None:
    assert name in dir(ptp_lightning)
    value = getattr(ptp_lightning, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_what_the_lists_name_is_the_same() -> None:
    assert sorted(ptp_lightning.__all__) == ptp_lightning.__all__
    assert set(ptp_lightning.__all__) == ptp_lightning._HOMES.keys() | {"__version__"}


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'ptp_lightning' has no attribute 'ParalelTokenPredictor'"):
        ptp_lightning.ParalelTokenPredictor  # noqa: B018


def test_version_is_that_of_the_package() -> None:
    assert ptp_lightning.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
