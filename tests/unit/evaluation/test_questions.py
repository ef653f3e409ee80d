"""Questions in published formats, and errors for invalid files."""

import gzip
import json
from pathlib import Path

import pytest

from ptp_lightning.data import StandardLibrary
from ptp_lightning.evaluation import Question, read_questions

ROWS = {
    "spec_bench": (
        {"question_id": 7, "category": "math", "turns": ["How many?", "And why?"], "reference": ["2"]},
        Question("7", "math", ("How many?", "And why?")),
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n"},
        Question("HumanEval/0", "humaneval", ("def f():\n",)),
    ),
    "gsm8k": ({"question": "1 + 1?", "answer": "2"}, Question("1", "gsm8k", ("1 + 1?",))),
    "mbpp": (
        {"text": "Add.", "code": "..", "test_list": ["assert a", "assert b"]},
        Question("1", "mbpp", ("Add.\n\nassert a\nassert b\n\n",)),
    ),
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("benchmark", ROWS)
def test_reads_the_published_format(benchmark: str, tmp_path: Path) -> None:
    row, expected = ROWS[benchmark]
    assert read_questions(benchmark, write(tmp_path / "q.jsonl", row)) == [expected]


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("def f\n\nclass ü\n", encoding="utf-8")
    assert read_questions("prompts", path) == [
        Question("1", "prompts", ("def f",)),
        Question("3", "prompts", ("class ü",)),
    ]


def test_a_limit_selects_from_all_categories(tmp_path: Path) -> None:
    rows = [
        {"question_id": number, "category": category, "turns": ["x"]}
        for number, category in enumerate(["a", "a", "a", "b", "b", "c"])
    ]
    path = write(tmp_path / "q.jsonl", *rows)
    assert [question.question_id for question in read_questions("spec_bench", path, limit=4)] == ["0", "3", "5", "1"]
    assert len(read_questions("spec_bench", path)) == 6


def test_held_out_code_needs_no_file() -> None:
    questions = read_questions("held_out_code", limit=5)
    assert len(questions) == 5 and len(read_questions("held_out_code")) > 20
    names = {document.name: document.text for document in StandardLibrary().documents("test")}
    for question in questions:
        (excerpt,) = question.turns
        assert 0 < len(excerpt) <= 600 and "\n" + excerpt in names[question.question_id]


class TestErrors:
    def test_unneeded_and_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected no --questions"):
            read_questions("held_out_code", tmp_path / "q.jsonl")
        with pytest.raises(ValueError, match="expected --questions with --benchmark gsm8k"):
            read_questions("gsm8k")

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="set --questions"):
            read_questions("gsm8k", tmp_path / "none.jsonl")

    def test_unknown_benchmark(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected --benchmark to be one of held_out_code, spec_bench"):
            read_questions("mmlu", tmp_path)

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("{", "line 2: expected a question of spec_bench"),
            ('{"question_id": 1, "category": "a"}', "line 2: expected a question of spec_bench, found no 'turns'"),
            ('{"question_id": 1, "category": "a", "turns": []}', "line 2: expected turns of text"),
            ('{"question_id": 1, "category": "a", "turns": [""]}', "line 2: expected turns of text"),
            ('{"question_id": 0, "category": "a", "turns": ["x"]}', "found '0' twice"),
            ("[]", "line 2: expected a question of spec_bench, found list instead of an object"),
            ('{"question_id": 1, "category": "a", "turns": "hi there"}', "found str instead of a list of turns"),
            ("[" * 100_000, "line 2: expected a question of spec_bench, found maximum recursion depth"),
            ('{"question_id": 1, "category": "a", "turns": ["\\ud800"]}', "line 2: expected Unicode text, found"),
            ("1" * 5000, "line 2: expected a question of spec_bench, found Exceeds the limit"),
        ],
    )
    def test_an_invalid_line(self, line: str, reason: str, tmp_path: Path) -> None:
        path = write(tmp_path / "q.jsonl", {"question_id": 0, "category": "a", "turns": ["x"]})
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(ValueError, match=reason):
            read_questions("spec_bench", path)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"text": "Add.", "test_list": "assert a"}, "found str instead of a list of tests"),
            ({"text": ["Add."], "test_list": []}, "found list instead of text"),
        ],
    )
    def test_entries_of_mbpp_in_another_form(self, row: object, reason: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"q.jsonl, line 1: expected a question of mbpp, {reason}"):
            read_questions("mbpp", write(tmp_path / "q.jsonl", row))

    def test_empty_file_and_other_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "q.jsonl"
        path.write_bytes(b"\n")
        with pytest.raises(ValueError, match="expected the questions of gsm8k in .*, found no lines with text"):
            read_questions("gsm8k", path)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match="expected UTF-8"):
            read_questions("gsm8k", path)


@pytest.mark.parametrize("char", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"], ids=ascii)
def test_no_character_but_a_line_feed_ends_a_question(char: str, tmp_path: Path) -> None:
    line = json.dumps({"question_id": 1, "category": "a", "turns": [f"a{char}b"]}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text(f"\ufeff{line}\r\n\n", encoding="utf-8", newline="")
    assert [question.turns for question in read_questions("spec_bench", tmp_path / "q.jsonl")] == [(f"a{char}b",)]


def test_a_compressed_file_as_published(tmp_path: Path) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n"}
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert [question.turns for question in read_questions("humaneval", tmp_path / "HumanEval.jsonl.gz")] == [
        ("def f():\n",)
    ]
