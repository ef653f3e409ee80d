"""What the documentation says can be done: commands parse, names exist, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from ptp_lightning.cli import dispatch
from ptp_lightning.utils.named_files import find_yaml
from tests.helpers.documentation import (
    EARLIER_NAMES,
    LANGUAGES,
    PAGES,
    RESULTS,
    ROOT,
    Block,
    all_commands,
    anchors,
    blocks,
    commands,
    disguised_commands,
    link_checkout,
    links,
    name_of,
    write_named_files,
)
from tests.helpers.documentation_elsewhere import RUN_ELSEWHERE
from tests.helpers.documentation_programs import READERS_OWN, way_of

README = ROOT / "README.md"
MAX_README_LINES = 130
LAUNCHERS = ("torchrun", "srun")
OTHER_PROGRAMS = {
    *("tensorboard", "jupyter", "optuna", "optuna-dashboard", "pre-commit", "sphinx-build", "transformers"),
    *("ruff", "lint-imports", "pyright", "hf", "ptp-lightning"),
}
PATH = re.compile(r"`((?:configs|sweeps|docs|ptp_lightning|tests|benchmarks|notebooks)/[\w./-]+)`")


class ParsedError(BaseException):
    """The arguments of a command are accepted; nothing runs."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every parser stop the program after it has read the arguments."""
    depth = 0

    def stopping(original: Any) -> Any:
        def parse_args(parser: Any, *args: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1  # parsers of classes are called by those of commands
            try:
                result = original(parser, *args, **options)
            finally:
                depth -= 1
            if depth == 0:
                raise ParsedError
            return result

        return parse_args

    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        monkeypatch.setattr(parser, "parse_args", stopping(parser.parse_args))


def pages_with(language: str) -> list[Any]:
    pages = [page for page in PAGES if any(block.language == language for block in blocks(page))]
    return [pytest.param(page, id=name_of(page)) for page in pages]


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_accepted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link_checkout(tmp_path)
    write_named_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for command in all_commands(page):
        check_command([READERS_OWN.get(word, word) for word in command.words], monkeypatch)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a command that cannot work."""
    program, *args = words
    if program in LAUNCHERS:
        check_command(["python", *args[args.index("-m") :]], monkeypatch)
    elif program == "python" and args[0] == "-m":
        check_module(args[1], args[2:], monkeypatch)
    elif program in ("python", ".ci/run"):
        assert (ROOT / (args or words)[0]).is_file(), words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert args[0] == "install"
        assert {name for found in re.findall(r"\[(.*?)\]", " ".join(args)) for name in found.split(",")} <= set(extras)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in args if "/" in word), words
    else:
        assert program in OTHER_PROGRAMS, f"{words}: say in this test how it is checked"


def check_module(name: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the parser of a module that is run read its arguments."""
    if name != "ptp_lightning":
        assert find_spec(name) is not None, name
        if name.startswith("tests."):
            return
        monkeypatch.setattr(sys, "argv", [name, *args])
        with pytest.raises(ParsedError):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    if args[0] == "sweep":
        assert find_yaml(args[2], "sweeps").is_file(), args
    try:
        dispatch(args)
    except ParsedError:
        return
    except SystemExit as end:
        accepted = end.code in (0, None)  # --help and --print_config
    else:
        accepted = bool({"--help", "--version"} & set(args))
    assert accepted, f"{args} was refused, or did not parse its arguments"


def unaccounted(page: Path) -> list[str]:
    """Places of a page with something for a reader to run that no test runs: file, line and text."""
    found = [
        f"{page.name}:{command.line}: {command.text}"
        for command in all_commands(page)
        if way_of(command) is None and command.text not in RUN_ELSEWHERE
    ]
    for block in blocks(page):
        if block.language not in LANGUAGES:
            found.append(f"{page.name}:{block.line}: a block of {block.language}, expected one of {LANGUAGES}")
        found += [f"{page.name}:{line}: a command outside of a block of bash" for line in disguised_commands(block)]
    return found


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_all_that_can_be_run_is_run_by_a_test(page: Path) -> None:
    """Here (all Python is), or elsewhere; see `WAYS` and `RUN_ELSEWHERE`."""
    assert not unaccounted(page), "add a way to run it, or where it runs"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```bash\npytest\nmake all\n```\n", "page.md:4: make all"),
        ("```sh\npytest\n```\n", "page.md:3: a block of sh"),
        ("```\n$ pytest\n```\n", "page.md:3: a command outside"),
        ("Type `hf download user/model`.\n", "page.md:2: hf download user/model"),
    ],
)
def test_what_no_test_runs_is_named_with_its_line(text: str, found: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{text}")
    (place,) = unaccounted(page)
    assert place.startswith(found)


def test_commands_run_where_the_table_says() -> None:
    """The table names places that exist, for commands that the documentation has."""
    for text, place in RUN_ELSEWHERE.items():
        assert place.words in (ROOT / place.file).read_text(encoding="utf-8"), f"{text}: {place}"
    texts = {command.text for page in PAGES for command in all_commands(page)}
    assert RUN_ELSEWHERE.keys() <= texts, "leave out what no page has"


@pytest.mark.parametrize("page", pages_with("python"))
def test_imports_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ptp_lightning"):
                module = import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_classes_of_yaml_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            yaml.safe_load(block.text)
            for path in re.findall(r"class_path: (ptp_lightning[\w.]+)", block.text):
                module, _, name = path.rpartition(".")
                assert hasattr(import_module(module), name), path


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings within the repository, and files that are named in code."""
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(path), f"{name_of(page)}: {link}"
    if RESULTS not in page.parents:
        text = page.read_text(encoding="utf-8").split(EARLIER_NAMES)[0]
        missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
        assert not missing, f"{name_of(page)}: {missing}"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_every_page_is_in_a_table_of_contents() -> None:
    trees = [block.text for block in blocks(ROOT / "docs" / "index.md")]
    listed = {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).with_suffix("").as_posix() for page in PAGES if docs in page.parents}
    assert listed == pages - {"index"}


def test_pictures_are_drawn_by_a_script() -> None:
    """A picture has a script of its name beside it, or one that a page names for it."""
    pictures = {path for path in (ROOT / "docs").rglob("*.png") if "_build" not in path.parts}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    scripts = [path for path in (ROOT / "docs").rglob("*.py") if "_build" not in path.parts and path.name in text]
    drawn = "".join(path.read_text(encoding="utf-8") for path in scripts)
    assert not [picture.name for picture in pictures if picture.stem not in drawn]


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize(
    "command",
    [
        "python -m ptp_lightning fit --config configs/gated_lora.yaml --trainer.max_step 3",
        "python -m ptp_lightning generate --promt x",
        "python -m benchmarks.streaming --megabyte 1 --more",
        "python -m ptp_lightning sweep run no_such_study",
        "pip install -e '.[no_such_extra]'",
        "pytest tests/no_such_folder",
        "no_such_program",
    ],
)
def test_commands_that_cannot_work_are_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (found,) = commands(Block("bash", command))
    with pytest.raises((AssertionError, ValueError, SystemExit, pytest.fail.Exception)):
        check_command(found.words, monkeypatch)
