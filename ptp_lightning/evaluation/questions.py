"""Questions of public benchmarks, read from files in the formats that their authors publish.

A new benchmark is one function from a JSON object to a `Question`, and one line in `BENCHMARKS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptp_lightning.utils.local_paths import local_path
from ptp_lightning.utils.text_files import read_lines


@dataclass(frozen=True)
class Question:
    """One conversation.

    Attributes:
        question_id: unique in its file.
        category: questions of a category are reported together.
        turns: messages of the user; each is answered before the next.
    """

    question_id: str
    category: str
    turns: tuple[str, ...]


def spec_bench(row: dict[str, Any], number: int) -> Question:
    """Spec-Bench (Xia et al., 2024): question_id, category, turns."""
    if not isinstance(row["turns"], list):
        raise TypeError(f"{type(row['turns']).__name__} instead of a list of turns")
    return Question(str(row["question_id"]), str(row["category"]), tuple(row["turns"]))


def humaneval(row: dict[str, Any], number: int) -> Question:
    """HumanEval (Chen et al., 2021): the start of a function, to be continued."""
    return Question(str(row["task_id"]), "humaneval", (row["prompt"],))


def gsm8k(row: dict[str, Any], number: int) -> Question:
    """GSM8K (Cobbe et al., 2021): a mathematical word problem."""
    return Question(str(number), "gsm8k", (row["question"],))


def mbpp(row: dict[str, Any], number: int) -> Question:
    """MBPP (Austin et al., 2021): a task in words, and the tests of its solution."""
    if not isinstance(row["test_list"], list):
        raise TypeError(f"{type(row['test_list']).__name__} instead of a list of tests")
    if not isinstance(row["text"], str):
        raise TypeError(f"{type(row['text']).__name__} instead of text")
    tests = "\n".join(row["test_list"])
    return Question(str(row.get("task_id", number)), "mbpp", (f"{row['text']}\n\n{tests}\n\n",))


BENCHMARKS: dict[str, Callable[[dict[str, Any], int], Question] | None] = {
    "held_out_code": None,
    "spec_bench": spec_bench,
    "humaneval": humaneval,
    "gsm8k": gsm8k,
    "mbpp": mbpp,
    "prompts": None,
}
"""Parsers by name. `held_out_code` needs no file, see `held_out_code`; `prompts` is a text file, a prompt a line."""

HELD_OUT_CODE, PROMPTS = "held_out_code", "prompts"
NUM_CHARACTERS = 600


def held_out_code() -> list[Question]:
    """An excerpt of each file of Python's standard library that the embedded models were not trained on."""
    from ptp_lightning.data.corpus import StandardLibrary  # slow to import

    questions = []
    for document in StandardLibrary().documents("test"):
        begin = document.text.find("\n", len(document.text) // 4) + 1
        excerpt = document.text[begin : begin + NUM_CHARACTERS]
        if excerpt.strip():
            questions.append(Question(document.name, HELD_OUT_CODE, (excerpt,)))
    return questions


def read_questions(benchmark: str, path: str | Path | None = None, limit: int | None = None) -> list[Question]:
    """The questions of a file. Categories are interleaved, so that a limit selects from all of them.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the benchmark is unknown, or a line is invalid; the message names file and line.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"expected --benchmark to be one of {', '.join(BENCHMARKS)}, found {benchmark!r}")
    if benchmark == HELD_OUT_CODE:
        if path is not None:
            raise ValueError(f"expected no --questions with --benchmark {HELD_OUT_CODE}, found {path}")
        return held_out_code()[:limit]
    if path is None:
        raise ValueError(f"expected --questions with --benchmark {benchmark}, found none")
    questions = list(_questions(benchmark, local_path(path, "--questions")))
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise ValueError(
                f"expected unique question ids, found {question.question_id!r} twice in {path}: set --questions"
            )
        seen.add(question.question_id)
    return _interleave_categories(questions)[:limit]


def _questions(benchmark: str, path: Path) -> Iterator[Question]:
    parse = BENCHMARKS[benchmark]
    for number, line in read_lines(path, f"the questions of {benchmark}", "--questions"):
        if parse is None:
            yield Question(str(number), PROMPTS, (line,))
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"{type(row).__name__} instead of an object")
            question = parse(row, number)
        except (ValueError, KeyError, TypeError, RecursionError) as error:  # a ValueError for long numbers, too
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, line {number}: expected a question of {benchmark}, found {reason}") from error
        if not question.turns or not all(isinstance(turn, str) and turn for turn in question.turns):
            raise ValueError(f"{path}, line {number}: expected turns of text, found {question.turns!r:.80}")
        try:
            "".join(question.turns).encode()
        except UnicodeEncodeError as error:  # JSON can contain unpaired surrogates
            raise ValueError(f"{path}, line {number}: expected Unicode text, found {error}") from error
        yield question


def _interleave_categories(questions: list[Question]) -> list[Question]:
    """The first question of each category, then the second of each, and so on, in the order of the file."""
    count: dict[str, int] = {}
    rank = []
    for question in questions:
        rank.append(count.setdefault(question.category, 0))
        count[question.category] += 1
    return [questions[index] for index in sorted(range(len(questions)), key=lambda index: rank[index])]
