"""Prompts of documents: the tokens before the completion, or the first tokens."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from ptp_lightning.data import Chat, JsonLines, PlainText, PromptAndCompletion, Rendering, StreamingCorpus, StreamPart
from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.pregeneration.prompts import find_prompts
from tests.helpers.tiny_data import Texts, tiny_data, tiny_tokenizer

MAX_LENGTH = 100
TEMPLATE = (
    "{% for m in messages %}{{ m.role[:1] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


class TestCorpus:
    def test_the_first_tokens_of_documents(self) -> None:
        data = tiny_data(Texts(["abcdef", "", "gh", "ijk"]))
        assert find_prompts(data, None, 3, MAX_LENGTH) == [[1, 2, 3], [7, 8], [9, 10, 11]]
        assert find_prompts(data, None, 1, MAX_LENGTH) == [[1], [7], [9]]

    def test_evenly_spaced(self) -> None:
        data = tiny_data(Texts([letter * 3 for letter in "abcdefghij"]))
        assert find_prompts(data, 4, 1, MAX_LENGTH) == [[1], [3], [6], [8]]

    @pytest.mark.parametrize("end_of_text", [True, False])
    def test_no_end_of_text_in_a_prompt(self, end_of_text: bool) -> None:
        assert find_prompts(tiny_data(Texts(["ab"]), end_of_text), None, 10, MAX_LENGTH) == [[1, 2]]

    def test_first_tokens_are_never_too_long(self) -> None:
        assert find_prompts(tiny_data(Texts(["abcdef"])), None, 4, 2) == [[1, 2, 3, 4]]

    def test_all_processes_share_the_same_prompts(self) -> None:
        data = tiny_data(Texts(["ab", "cd", "ef"]))
        data.shard_spec = lambda: ShardSpec(1, 2)
        assert find_prompts(data, None, 1, MAX_LENGTH) == [[1], [3], [5]]

    def test_too_few_documents(self) -> None:
        with pytest.raises(ValueError, match="expected 3 prompts .*found 2: lower --num_prompts, or set data"):
            find_prompts(tiny_data(Texts(["ab", "c"])), 3, 1, MAX_LENGTH)
        with pytest.raises(ValueError, match="found 2 documents without text.*data.corpus"):
            find_prompts(tiny_data(Texts(["", ""])), None, 1, MAX_LENGTH)


def part(path: Path, rows: list[dict[str, Any]], rendering: Rendering | None = None) -> StreamPart:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return StreamPart(JsonLines([str(path)]), rendering)


def stream(*parts: StreamPart, **settings: Any) -> StreamingCorpus:
    """All documents are training data."""
    data = StreamingCorpus(list(parts), **({"shuffle_documents": 3, "eval_parts": list(parts)} | settings))
    data.tokenizer = tiny_tokenizer()
    return data


class TestStream:
    TASK = PromptAndCompletion("{task} ", "{solution}")

    def test_the_tokens_before_the_completion(self, tmp_path: Path) -> None:
        rows = [{"task": "abcd", "solution": "ef"}, {"task": "gh", "solution": ""}]
        prompts = find_prompts(stream(part(tmp_path / "0.jsonl", rows, self.TASK)), None, 1, MAX_LENGTH)
        assert sorted(prompts) == [[1, 2, 3, 4, 27], [7, 8, 27]]

    def test_a_conversation_up_to_the_first_answer(self, tmp_path: Path) -> None:
        messages = [("user", "bc"), ("assistant", "d"), ("user", "e"), ("assistant", "f")]
        rows = [{"messages": [{"role": role, "content": text} for role, text in messages[:turns]]} for turns in (4, 1)]
        data = stream(part(tmp_path / "0.jsonl", rows, Chat(template=TEMPLATE)))
        u, b, c, a = 21, 2, 3, 1
        assert find_prompts(data, None, 1, MAX_LENGTH) == [[u, b, c, a]]  # the other conversation has no answer

    def test_every_document_of_a_mixture_once(self, tmp_path: Path) -> None:
        tasks = [{"task": letter * 2, "solution": "z"} for letter in "abcdefg"]
        parts = (
            part(tmp_path / "0.jsonl", tasks, self.TASK),
            part(tmp_path / "1.jsonl", [{"text": letter * 3} for letter in "hij"], PlainText()),
        )
        prompts = find_prompts(stream(*parts), None, 2, MAX_LENGTH)
        assert sorted(prompts) == [[k, k, 27] for k in range(1, 8)] + [[k, k] for k in range(8, 11)]
        assert prompts == find_prompts(stream(*parts), None, 2, MAX_LENGTH) != sorted(prompts)

    def test_the_first_ones(self, tmp_path: Path) -> None:
        one = part(tmp_path / "0.jsonl", [{"text": letter * 3} for letter in "abcdefghij"])
        assert find_prompts(stream(one), 4, 2, MAX_LENGTH) == find_prompts(stream(one), None, 2, MAX_LENGTH)[:4]

    def test_no_held_out_documents(self, tmp_path: Path) -> None:
        rows = [{"text": first + second} for first in "abcdefghij" for second in "abcdefghij"]
        data = stream(part(tmp_path / "0.jsonl", rows), eval_parts=None, eval_rows=100, row_length=3, num_windows=1)
        held_out = {
            tuple(row[:2])
            for split in ("val", "test")
            for b in data.fixed_batches(split)
            for row in b.input_ids.tolist()
        }
        prompts = {tuple(prompt) for prompt in find_prompts(data, None, 2, MAX_LENGTH)}
        assert held_out and not held_out & prompts and len(held_out | prompts) == len(rows)

    def test_too_long_prompts_are_skipped_and_counted(self, tmp_path: Path) -> None:
        rows = [{"task": letter * length, "solution": "z"} for length, letter in enumerate("abcdef", start=1)]
        data = stream(part(tmp_path / "0.jsonl", rows, self.TASK))
        with pytest.warns(UserWarning, match="skipped 2 prompts of more than 5 tokens"):
            assert sorted(map(len, find_prompts(data, None, 1, 5))) == [2, 3, 4, 5]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(find_prompts(data, None, 1, 7)) == 6
        with pytest.raises(ValueError, match="found 0 and 6 of more than 1 tokens: .*raise --prompt_tokens"):
            find_prompts(data, None, 1, 1)

    def test_invalid_rows(self, tmp_path: Path) -> None:
        (tmp_path / "0.jsonl").write_text('{"text": "ab"}\n{"text": \n')
        one = StreamPart(JsonLines([str(tmp_path / "0.jsonl")]))
        with pytest.raises(ValueError, match="0.jsonl, line 2.*data.on_error"):
            find_prompts(stream(one), None, 2, MAX_LENGTH)
        with pytest.warns(UserWarning, match="skipped 1 invalid rows"):
            assert find_prompts(stream(one, on_error="skip"), None, 2, MAX_LENGTH) == [[1, 2]]
