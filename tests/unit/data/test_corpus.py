"""Corpora: which documents, in which split, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from ptp_lightning.data.corpus import FEWEST_LINES, Split, StandardLibrary, TextFiles, split_of
from ptp_lightning.testing import check_corpus

SPLITS: tuple[Split, ...] = get_args(Split)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("ast.py", "train"),  # bucket 0
        ("sched.py", "train"),  # bucket 89, the last one
        ("encodings/utf_32_le.py", "val"),  # bucket 90, the first one
        ("hmac.py", "val"),  # bucket 94, the last one
        ("socket.py", "test"),  # bucket 95, the first one
        ("asyncio/transports.py", "test"),  # bucket 99
    ],
)
def test_a_file_never_changes_its_split(name: str, split: Split) -> None:
    assert split_of(name) == split


def test_fractions_of_the_splits() -> None:
    splits = [split_of(f"{number}.py") for number in range(4000)]
    assert [round(splits.count(split) / 4000, 2) for split in SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.011)


class TestStandardLibrary:
    def test_splits_are_disjoint_and_sorted(self) -> None:
        names = {split: [document.name for document in StandardLibrary().documents(split)] for split in SPLITS}
        assert all(found == sorted(set(found)) and found for found in names.values())
        everything = [name for found in names.values() for name in found]
        assert len(everything) == len(set(everything)) > 300
        assert "asyncio/tasks.py" in names["val"]

    def test_contract(self) -> None:
        check_corpus(StandardLibrary())

    def test_leaves_out_tests_and_foreign_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = ["a.py", "package/b.py", "package/latest.py", "unittest/c.py"]
        left_out = [
            "test/a.py",
            "package/tests/b.py",
            "idlelib/idle_test/c.py",
            "site-packages/torch/d.py",
            "dist-packages/e.py",
            "__pycache__/f.py",
            "notes.txt",
        ]
        for name in kept + left_out:
            write(tmp_path / name, f"# {name}")
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})

        found = {document.name: document.text for split in SPLITS for document in StandardLibrary().documents(split)}

        assert found == {name: f"# {name}" for name in kept}

    def test_error_if_python_ships_no_source(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(FileNotFoundError, match="data.corpus"):
            next(StandardLibrary().documents("train"))


class TestTextFiles:
    def test_hash_mode_puts_each_file_into_one_split(self, tmp_path: Path) -> None:
        names = [f"{number:02d}.txt" for number in range(60)]
        for name in names:
            write(tmp_path / name, f"text of {name}")
        write(tmp_path / "deeper" / "x.txt", "text of deeper/x.txt")
        write(tmp_path / "picture.png", "no text")
        (tmp_path / "folder.txt").mkdir()  # matches the pattern and is no file

        found = {split: list(TextFiles([str(tmp_path)]).documents(split)) for split in SPLITS}

        assert sorted(d.name for split in SPLITS for d in found[split]) == sorted([*names, "deeper/x.txt"])
        for split, documents in found.items():
            assert [document.name for document in documents] == sorted(document.name for document in documents)
            assert all(split_of(name) == split and text == f"text of {name}" for name, text in documents)

    @pytest.mark.parametrize("num_lines", [FEWEST_LINES, FEWEST_LINES + 1, 3 * FEWEST_LINES - 1])
    def test_enough_lines_for_every_split(self, tmp_path: Path, num_lines: int) -> None:
        (tmp_path / "one.txt").write_text("x\n" * num_lines)
        corpus = TextFiles([str(tmp_path / "one.txt")], held_out="lines")
        assert all(document.text for split in SPLITS for document in corpus.documents(split))

    def test_lines_mode_splits_every_file(self, tmp_path: Path) -> None:
        write(tmp_path / "one.txt", "".join(f"line {number}\n" for number in range(100)))
        corpus = TextFiles([str(tmp_path / "one.txt")], held_out="lines")

        texts = [next(iter(corpus.documents(split))).text.splitlines() for split in ("train", "val", "test")]

        assert texts[0] == [f"line {number}" for number in range(90)]
        assert texts[1] == [f"line {number}" for number in range(90, 95)]
        assert texts[2] == [f"line {number}" for number in range(95, 100)]

    def test_pattern(self, tmp_path: Path) -> None:
        write(tmp_path / "a.md", "a\n" * 20)
        write(tmp_path / "b.txt", "b\n" * 20)
        corpus = TextFiles([str(tmp_path)], pattern="*.md", held_out="lines")
        assert [document.name for document in corpus.documents("train")] == ["a.md"]

    def test_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere.*data.corpus.paths"):
            TextFiles([str(tmp_path / "nowhere")])

    def test_empty_list(self) -> None:
        with pytest.raises(ValueError, match="data.corpus.paths"):
            TextFiles([])

    def test_unknown_held_out(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="data.corpus.held_out.*'line'"):
            TextFiles([str(tmp_path)], held_out="line")  # pyright: ignore[reportArgumentType]

    def test_unknown_split(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="'dev'"):
            next(TextFiles([str(tmp_path)]).documents("dev"))  # pyright: ignore[reportArgumentType]

    def test_undecodable_bytes_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "broken.txt").write_bytes(b"good \xff bad")
        with pytest.raises(ValueError, match=r"broken\.txt.*0xff.*data\.corpus\.paths"):
            list(TextFiles([str(tmp_path / "broken.txt")], held_out="lines").documents("train"))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
