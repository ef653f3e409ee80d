"""The pages of the documentation, and what is in them: code blocks, commands, links."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if "_build" not in path.parts and path.name != "CHANGELOG.md"
)
FENCE = re.compile(r"^```([^`\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FILE_COMMENT = re.compile(r"\A# (\w+\.\w+)\n")
ASSIGNMENT = re.compile(r"\w+=\S*")
INLINE_COMMAND = re.compile(
    r"`((?:python|pip|torchrun|srun|pytest|sphinx-build|hf|transformers|tensorboard|jupyter|optuna|ptp-lightning)"
    r" [^`\n]+|\.ci/run)`"
)
COMMAND_LINE = re.compile(r"(\$ |>>> |(?:python|pip|torchrun|srun|pytest|git|transformers|hf) -?[\w./-]+)")
RESULTS = ROOT / "docs" / "results"  # names commands and files of earlier commits
EARLIER_NAMES = "## Names of version 0.1"  # in the glossary
LANGUAGES = ("bash", "python", "yaml", "", "{toctree}")
"""Of blocks: what is run, what is read, and what is only shown, such as output."""


class Block(NamedTuple):
    """A fenced block of a page: its language, empty if none is named, its lines, and where in the page they begin."""

    language: str
    text: str
    line: int = 1


class Command(NamedTuple):
    """The words of a command for a shell, what is assigned before it, and its line in the page."""

    words: list[str]
    line: int
    assigned: dict[str, str]

    @property
    def text(self) -> str:
        """Its words, without quotes."""
        return " ".join(self.words)


def name_of(page: Path) -> str:
    """The name of a page in messages."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(*found.groups(), line=_line_at(text, found.start(2))) for found in FENCE.finditer(text)]


def commands(block: Block) -> Iterator[Command]:
    """Each command of a block for a shell.

    >>> list(commands(Block("bash", "# why\\nA=1 ls \\\\\\n  -l && pwd\\n")))
    [Command(words=['ls', '-l'], line=2, assigned={'A': '1'}), Command(words=['pwd'], line=2, assigned={})]
    """
    # A continued line counts where it begins.
    continued = block.text.replace("\\\n", " \0")
    line = block.line
    for text in continued.splitlines():
        yield from _commands_of(text.replace("\0", ""), line)
        line += 1 + text.count("\0")


def inline_commands(page: Path) -> Iterator[Command]:
    """Each command within a sentence; not those of earlier versions, which results and old names cite."""
    if RESULTS in page.parents:
        return
    text = page.read_text(encoding="utf-8").split(EARLIER_NAMES)[0]
    sentences = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for found in INLINE_COMMAND.finditer(sentences):
        yield from _commands_of(found[1], _line_at(sentences, found.start()))


def all_commands(page: Path) -> Iterator[Command]:
    """The commands of all blocks, then those within sentences."""
    for block in blocks(page):
        if block.language == "bash":
            yield from commands(block)
    yield from inline_commands(page)


def disguised_commands(block: Block) -> list[int]:
    """The lines of a block that looks like output and holds commands."""
    lines = enumerate(block.text.splitlines(), start=block.line)
    return [number for number, line in lines if block.language == "" and COMMAND_LINE.match(line)]


def _commands_of(text: str, line: int) -> Iterator[Command]:
    for part in text.split(" && "):
        words = shlex.split(part, comments=True)
        assigned = {}
        while words and ASSIGNMENT.fullmatch(words[0]):
            name, _, value = words.pop(0).partition("=")
            assigned[name] = value
        if words:
            yield Command(words, line, assigned)


def _line_at(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def write_named_files(page: Path, folder: Path) -> None:
    """Write the blocks whose first line is a comment with the name of a file."""
    for block in blocks(page):
        if found := FILE_COMMENT.match(block.text):
            (folder / found[1]).write_text(block.text, encoding="utf-8")


def prose(page: Path) -> str:
    """The page without code."""
    return INLINE_CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are not addresses of the web."""
    return [target for target in LINK.findall(prose(page)) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Names under which the headings of a page can be linked, as on GitHub and in MyST."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    kept = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in kept}


def link_checkout(folder: Path) -> None:
    """Let a folder have the parts of the repository that commands name; of `docs`, into which some write, a copy."""
    for name in ("configs", "sweeps", "notebooks", "tests", "benchmarks", "ptp_lightning"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("_build", "__pycache__"))
