"""Lines of text files: what ends one, what is left out, and what is refused."""

import gzip
from pathlib import Path

import pytest

from ptp_lightning.utils.text_files import read_lines


def lines(path: Path) -> list[tuple[int, str]]:
    return read_lines(path, "prompts", "--prompts")


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"], ids=ascii)
def test_no_other_character_ends_a_line(char: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(f"a{char}b\nc".encode())
    assert lines(tmp_path / "p.txt") == [(1, f"a{char}b"), (2, "c")]


def test_byte_order_mark_carriage_returns_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffdef f():\r\n\r\n  x = 1\r\n \t\n".encode())
    assert lines(tmp_path / "p.txt") == [(1, "def f():"), (3, "  x = 1")]


def test_a_compressed_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(b"a\nb\n"))
    assert lines(tmp_path / "p.txt.gz") == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.txt", b"\xff\xfe", "expected UTF-8 text in"),
        ("p.txt", b"\n \n", "found no lines with text: set --prompts"),
        ("p.gz", b"text", "expected a complete gzip file at"),
        ("p.gz", gzip.compress(b"a" * 1000)[:-12], "expected a complete gzip file at"),
    ],
    ids=["bytes", "blank lines", "text named gz", "cut off"],
)
def test_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        lines(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected prompts at .*: set --prompts"):
        lines(tmp_path / "none.txt")
