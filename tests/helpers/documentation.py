"""The pages of the documentation, and what is in them: code blocks, commands, links."""

from __future__ import annotations

import re
import shlex
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


class Block(NamedTuple):
    """A fenced block of a page: its language, empty if none is named, and its lines."""

    language: str
    text: str


def name_of(page: Path) -> str:
    """The name of a page in messages."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block for a shell, without assignments before it.

    >>> list(commands(Block("bash", "# why\\nA=1 ls \\\\\\n  -l && pwd\\n")))
    [['ls', '-l'], ['pwd']]
    """
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and ASSIGNMENT.fullmatch(words[0]):
                del words[0]
            if words:
                yield words


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
    """Let a folder have the parts of the repository that commands name."""
    for name in ("configs", "sweeps", "notebooks", "docs", "tests", "benchmarks", "ptp_lightning"):
        (folder / name).symlink_to(ROOT / name)
