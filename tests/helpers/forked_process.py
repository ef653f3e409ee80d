"""Processes that begin with torch, Lightning and transformers loaded.

Importing them takes some seconds. Tests that kill, suspend or interrupt a program need a process of its own, but not a
fresh interpreter: a server imports the libraries once, and every process is forked from it.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Libraries only: the server may not find the package of this checkout.
PRELOADED = [
    "lightning.pytorch.cli",
    "optuna",
    "peft",
    "pyarrow.parquet",
    "torch.utils.tensorboard",
    "torchmetrics",
    "transformers.models.llama.modeling_llama",
]


class ForkedProcess:
    """Calls a function in a process group of its own; the interface is that of `subprocess.Popen`.

    Args:
        function: of a module that can be imported.
        *arguments: of the function.
        folder: its current folder.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any, folder: Path) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name, name) for name in ("out", "err")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = context.Process(target=_run, args=(function, arguments, folder, environment, self._files))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status; None while it runs, negative after a signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self._process), timeout)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns what was written to standard output and standard error."""
        self.wait(timeout)
        out, err = (file.read_text(encoding="utf-8") for file in self._files)
        return out, err

    def wait_for_output(self, text: str, timeout: float = 120.0) -> None:
        """Wait until its standard output or its errors hold a text.

        Raises:
            AssertionError: it ends before, or does not write it in time.
        """
        deadline = time.monotonic() + timeout
        while not any(text in file.read_text("utf-8", errors="replace") for file in self._files if file.exists()):
            assert self.poll() is None, self.communicate()
            assert time.monotonic() < deadline, f"no {text!r} in {timeout} s"
            time.sleep(0.05)

    def send_signal(self, number: int) -> None:
        """Send a signal if it runs."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end, if it runs."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it if it runs."""
        self.send_signal(signal.SIGKILL)


def run_command(*arguments: str) -> None:
    """Run `python -m ptp_lightning` with these arguments."""
    run_file(ROOT / "ptp_lightning" / "__main__.py", *arguments)


def run_file(program: Path, *arguments: str) -> None:
    """Run `python program.py` with these arguments; Lightning starts further ranks with the same ones."""
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: Path,
    environment: dict[str, str],
    files: list[Path],
) -> None:
    import torch  # loaded already, but not in the process of the test

    os.setsid()
    set_start_method(None, force=True)  # of what it starts itself: the platform's default
    # A shell's background job ignores Ctrl-C, and so does what it starts; multiprocessing ignores it in its server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ |= environment
    torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
    for descriptor, path in zip((1, 2), files, strict=True):
        with path.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), descriptor)
    function(*arguments)
