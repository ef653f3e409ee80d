"""Prompts of files: the chosen column, without repetitions, as a user's turn where there is a chat template."""

from pathlib import Path

import pytest

from ptp_lightning.pregeneration.prompt_files import prompts_of_texts, read_prompt_texts
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.chat_tokenizer import chat, chat_tokenizer

ROWS = """\
{"question": "1 + 1?", "a": {"b": "x"}}

{"question": " 1 +  1", "a": {"b": "y"}}
{"question": "No", "a": {"b": "z"}}
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path / "rows.jsonl"


def test_texts_are_those_of_the_column_once(rows: Path) -> None:
    assert read_prompt_texts([f"{rows}:question"]) == ["1 + 1?", "No"]
    assert read_prompt_texts([f"{rows}:a.b", f"{rows}:question"]) == ["x", "y", "z", "1 + 1?", "No"]
    assert read_prompt_texts([]) == []


def test_a_text_is_a_user_turn_or_itself() -> None:
    with_template, without = chat_tokenizer(), byte_tokenizer()
    (prompt,) = prompts_of_texts(["No"], with_template, None)
    assert with_template.decode(prompt) == chat("No")
    (prompt,) = prompts_of_texts(["No"], without, None)
    assert without.decode(prompt) == "No"


def test_long_prompts_are_skipped() -> None:
    with pytest.warns(UserWarning, match="skipped 1 prompts of more than 3 tokens"):
        assert len(prompts_of_texts(["abc", "abcd"], byte_tokenizer(), 3)) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{}", r"expected FILE:COLUMN, found .*rows.jsonl without a column \(question, a\): set --prompts"),
        ("{}:answer", r"rows.jsonl, line 1: expected a column 'answer', found no 'answer' in \['a', 'question'\]"),
        ("{}:a", r"rows.jsonl, line 1: expected text in column 'a', found dict"),
    ],
)
def test_errors_are_one_line(entry: str, message: str, rows: Path) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        read_prompt_texts([entry.format(rows)])


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "line 1: expected a JSON object, found '\\[1\\]'"), ("{", "line 1: "), ('{"q": ""}', "found none")],
)
def test_invalid_rows_are_named(content: str, message: str, rows: Path) -> None:
    rows.write_text(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        read_prompt_texts([f"{rows}:q"])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"JSON lines at .*nowhere.jsonl, found no file: set --prompts"):
        read_prompt_texts([f"{tmp_path}/nowhere.jsonl:question"])
