"""StreamingCorpus: every document once per epoch, for any number of workers and ranks, and after any resume."""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ptp_lightning.data import (
    Chat,
    HubRows,
    JsonLines,
    PackedBatch,
    PlainText,
    PromptAndCompletion,
    StreamingCorpus,
    StreamPart,
    TextRows,
)
from ptp_lightning.data.corpus import Split, split_of
from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.streaming import unusable_rows
from tests.helpers.parameter_products import one_in

NUM_DOCUMENTS = 40
END = 0


def number_tokenizer(end_of_text: bool = True) -> PreTrainedTokenizerFast:
    """The word "17" is token 17; 0 ends a text. There is no token for padding."""
    vocabulary = {"|": END} | {str(number): number for number in range(1, 1000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="|"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="|" if end_of_text else None)


def write(path: Path, documents: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Document k, of 1 to 40, says "k k k", which makes a row of four tokens; four to a file."""
    numbers = range(1, NUM_DOCUMENTS + 1)
    return [
        write(tmp_path / f"{begin}.jsonl", [{"text": f"{k} {k} {k}"} for k in numbers[begin : begin + 4]])
        for begin in range(0, NUM_DOCUMENTS, 4)
    ]


def corpus(files: list[str], **settings: Any) -> StreamingCorpus:
    """All documents are training data; the same documents are used for evaluation."""
    parts = settings.pop("parts", None) or [StreamPart(JsonLines(files))]
    defaults = {"row_length": 4, "batch_size": 2, "num_windows": 2, "shuffle_documents": 8, "eval_parts": parts}
    data = StreamingCorpus(parts, **(defaults | settings))
    data.tokenizer = number_tokenizer()
    data.setup("fit")
    return data


def on_trainer(data: StreamingCorpus, **state: int) -> StreamingCorpus:
    """Attach a fake trainer with this state."""
    defaults = {"global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
    data.trainer = SimpleNamespace(**(defaults | state))  # pyright: ignore[reportAttributeAccessIssue]
    return data


def take(data: StreamingCorpus, count: int) -> list[PackedBatch]:
    return list(islice(data.train_dataloader(), count))


def documents(batches: list[PackedBatch]) -> list[int]:
    return [int(first) for batch in batches for first in batch.input_ids[:, 0]]


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return all(torch.equal(*tensors) for tensors in zip(left, right, strict=True))


class TestTrainingStream:
    def test_five_documents(self, tmp_path: Path) -> None:
        file = write(tmp_path / "data.jsonl", [{"text": text} for text in ("1 1", "2 2 2 2 2", "3", "4 4 4", "")])
        data = corpus([file], row_length=5, batch_size=1, shuffle_documents=1)  # in the order of the file
        rows = take(data, 4)
        assert [batch.input_ids[0].tolist() for batch in rows] == [
            [1, 1, END, 0, 0],
            [2, 2, 2, 2, 2],
            [3, END, 0, 0, 0],  # the end of document 2 stands alone, where no window can start
            [4, 4, 4, END, 0],
        ]
        assert [batch.document_ids[0].tolist() for batch in rows] == [
            [0, 0, 0, -1, -1],
            [0, 0, 0, 0, 0],
            [0, 0, -1, -1, -1],
            [0, 0, 0, 0, -1],
        ]
        assert data.statistics.too_short == 0 and data.statistics.split == 1

    def test_a_rendering_may_make_several_documents_of_a_row(self, files: list[str]) -> None:
        class Twice(PlainText):
            def documents(self, row: Any, tokenizer: Any) -> list[TokenDocument]:
                return [self.document(row, tokenizer)] * 2

        block = documents(take(corpus(files, parts=[StreamPart(JsonLines(files), Twice())], shuffle_documents=8), 8))
        assert list(Counter(block).values()) == [2] * 8

    def test_pieces_of_a_long_document_are_spread(self, tmp_path: Path) -> None:
        numbers = range(1, 9)
        file = write(tmp_path / "data.jsonl", [{"text": " ".join([str(k)] * 20)} for k in numbers])
        rows = documents(take(corpus([file], row_length=7, shuffle_documents=8), 12))
        assert sorted(rows) == sorted([*numbers] * 3)  # three pieces each
        assert sum(first == second for first, second in itertools.pairwise(rows)) < 8  # two a document if side by side

    @pytest.mark.parametrize("num_workers", [0, 1, 3])
    def test_every_document_once_an_epoch(self, files: list[str], num_workers: int) -> None:
        data = corpus(files, num_workers=num_workers)
        seen = documents(take(data, 3 * NUM_DOCUMENTS // 2))
        epochs = [seen[begin : begin + NUM_DOCUMENTS] for begin in range(0, len(seen), NUM_DOCUMENTS)]
        assert all(sorted(epoch) == list(range(1, NUM_DOCUMENTS + 1)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != sorted(epochs[0])

    def test_the_number_of_workers_has_no_effect(self, files: list[str]) -> None:
        alone, helped = (take(corpus(files, num_workers=count), 30) for count in (0, 2))
        assert all(same(*pair) for pair in zip(alone, helped, strict=True))

    def test_equal_seeds_give_equal_streams(self, files: list[str]) -> None:
        first, second, other = (take(corpus(files, seed=seed), 20) for seed in (1, 1, 2))
        assert all(same(*pair) for pair in zip(first, second, strict=True))
        assert documents(first) != documents(other)

    def test_processes_see_other_documents(self, files: list[str]) -> None:
        shards = [
            documents(take(on_trainer(corpus(files), global_rank=rank, world_size=2), NUM_DOCUMENTS // 4))
            for rank in (0, 1)
        ]
        assert sorted(shards[0] + shards[1]) == list(range(1, NUM_DOCUMENTS + 1))

    def test_windows_start_inside_documents(self, files: list[str]) -> None:
        for batch in take(corpus(files, row_length=11), 20):
            assert (batch.position_ids.gather(1, batch.window_starts) >= 1).all()
            assert (batch.document_ids.gather(1, batch.window_starts) >= 0).all()

    def test_rows_are_nearly_full(self, files: list[str]) -> None:
        batches = take(corpus(files, row_length=16, shuffle_documents=NUM_DOCUMENTS), 20)
        real = torch.cat([batch.document_ids for batch in batches]) >= 0
        assert real.float().mean() >= 0.95


class TestResume:
    @one_in(3, source=["json lines", "parquet"], steps=[0, 1, 9, 20, 33], workers=[(0, 0), (0, 2), (2, 0), (1, 4)])
    def test_resumes_where_it_was_stopped(
        self, files: list[str], workers: tuple[int, int], steps: int, source: str
    ) -> None:
        parts = [StreamPart(JsonLines(files) if source == "json lines" else HubRows("json", data_files=files))]
        settings: dict[str, Any] = {"parts": parts, "row_length": 7, "batch_size": 3}
        expected = take(corpus(files, **settings), steps + 8)[steps:]

        stopped = on_trainer(corpus(files, num_workers=workers[0], **settings))
        ahead = steps + 2  # two batches are prefetched and not consumed
        take(stopped, ahead)
        on_trainer(stopped, global_step=steps)
        state = json.loads(json.dumps(stopped.state_dict()))

        resumed = on_trainer(corpus(files, num_workers=workers[1], **settings), global_step=steps)
        resumed.load_state_dict(state)
        assert all(same(*pair) for pair in zip(take(resumed, 8), expected, strict=True))

    def test_repeated_resumes(self, files: list[str]) -> None:
        expected = take(corpus(files), 24)
        found: list[PackedBatch] = []
        state: dict[str, Any] | None = None
        for steps in range(0, 24, 4):
            data = on_trainer(corpus(files), global_step=steps)
            if state is not None:
                data.load_state_dict(state)
            found += take(data, 4)
            on_trainer(data, global_step=steps + 4)
            state = data.state_dict()
        assert all(same(*pair) for pair in zip(found, expected, strict=True))

    def test_accumulated_batches_count(self, files: list[str]) -> None:
        expected = take(corpus(files), 10)[6:]
        data = on_trainer(corpus(files), accumulate_grad_batches=3)
        take(data, 8)
        on_trainer(data, accumulate_grad_batches=3, global_step=2)
        resumed = on_trainer(corpus(files), accumulate_grad_batches=3, global_step=2)
        resumed.load_state_dict(data.state_dict())
        assert all(same(*pair) for pair in zip(take(resumed, 4), expected, strict=True))

    def test_a_new_iteration_continues_after_the_consumed_batches(self, files: list[str]) -> None:
        """Lightning starts a new iteration after every epoch, if `limit_train_batches` defines epochs."""
        expected = take(corpus(files), 14)
        data = on_trainer(corpus(files))
        loader = data.train_dataloader()
        found = list(islice(loader, 6))[:5]  # the last one was only prefetched
        on_trainer(data, global_step=5)
        found += islice(loader, 9)
        assert all(same(*pair) for pair in zip(found, expected, strict=True))

    def test_another_number_of_processes_is_rejected(self, files: list[str]) -> None:
        data = on_trainer(corpus(files))
        take(data, 1)
        resumed = on_trainer(corpus(files), world_size=2)
        resumed.load_state_dict(data.state_dict())
        with pytest.raises(ValueError, match="expected 1 processes.*found 2"):
            resumed.train_dataloader()

    @pytest.mark.parametrize(
        "other", [{"seed": 1}, {"row_length": 5}, {"shuffle_documents": 9}, {"parts": "two"}], ids=str
    )
    def test_another_stream_is_rejected(self, files: list[str], other: dict[str, Any]) -> None:
        data = on_trainer(corpus(files))
        take(data, 1)
        if "parts" in other:
            other = {"parts": [StreamPart(JsonLines(files))] * 2}
        resumed = on_trainer(corpus(files, **other))
        resumed.load_state_dict(data.state_dict())
        with pytest.raises(ValueError, match="expected the stream that the checkpoint was written from"):
            resumed.train_dataloader()

    def test_positions_of_consumed_batches_are_discarded(self, files: list[str]) -> None:
        data = on_trainer(corpus(files))
        loader = iter(data.train_dataloader())
        for step in range(200):
            next(loader)
            on_trainer(data, global_step=step)  # one batch is prefetched
        assert len(data.state_dict()["positions"]) == 1
        stream = data._stream
        assert stream is not None and len(stream._starts) <= 3

    def test_short_documents_are_counted(self, tmp_path: Path) -> None:
        data = corpus([write(tmp_path / "data.jsonl", [{"text": "1 1"}, {"text": ""}])], batch_size=1)
        with pytest.warns(UserWarning, match="skipped 1 documents of fewer than two tokens"):
            take(data, 1)
        assert data.statistics.too_short == 1

    def test_a_mixture_resumes(self, files: list[str]) -> None:
        parts = [StreamPart(JsonLines(files[:2]), weight=1.0), StreamPart(JsonLines(files[2:]), weight=3.0)]
        expected = take(corpus(files, parts=parts), 30)[17:]
        data = on_trainer(corpus(files, parts=parts))
        take(data, 19)
        on_trainer(data, global_step=17)
        resumed = on_trainer(corpus(files, parts=parts), global_step=17)
        resumed.load_state_dict(data.state_dict())
        assert all(same(*pair) for pair in zip(take(resumed, 13), expected, strict=True))


class TestMixtures:
    def test_weights_and_epochs(self, files: list[str]) -> None:
        """8 documents of weight 1 and 32 of weight 3: of 400 draws 100 +- 9 (one standard deviation) are of the 8."""
        parts = [StreamPart(JsonLines(files[:2]), weight=1.0), StreamPart(JsonLines(files[2:]), weight=3.0)]
        counts = Counter(documents(take(corpus(files, parts=parts), 200)))
        small, large = [counts[k] for k in range(1, 9)], [counts[k] for k in range(9, 41)]
        assert abs(sum(small) - 100) < 5 * 9
        # Each component yields whole epochs.
        assert max(small) - min(small) <= 1 and max(large) - min(large) <= 1

    def test_renderings_of_parts_differ(self, tmp_path: Path) -> None:
        plain = write(tmp_path / "plain.jsonl", [{"text": "1 1 1"}])
        tasks = write(tmp_path / "tasks.jsonl", [{"task": "2 2", "solution": "3"}])
        parts = [
            StreamPart(JsonLines([plain])),
            StreamPart(JsonLines([tasks]), PromptAndCompletion("{task}", " {solution}")),
        ]
        for batch in take(corpus([], parts=parts, batch_size=1, shuffle_documents=1), 12):
            completion_mask = [True] * 4 if batch.input_ids[0, 0] == 1 else [False, False, True, True]
            assert batch.completion_mask[0].tolist() == completion_mask
            assert all(completion_mask[start] for start in batch.window_starts[0].tolist())

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_invalid_weight_is_rejected(self, files: list[str], weight: float) -> None:
        with pytest.raises(ValueError, match="finite weight > 0"):
            StreamPart(JsonLines(files), weight=weight)


class TestHeldOutRows:
    def test_splits_share_no_document(self, tmp_path: Path) -> None:
        numbers = range(1, 601)
        file = write(tmp_path / "data.jsonl", [{"text": f"{k} {k} {k}"} for k in numbers])
        data = corpus([file], eval_parts=None, eval_rows=1000)
        val, test = (documents(data.fixed_batches(split)) for split in ("val", "test"))
        train = documents(take(data, 300))
        assert len(set(train) & set(val)) == len(set(train) & set(test)) == len(set(val) & set(test)) == 0
        assert len(set(val)) == len(val) > 10 and len(set(test)) == len(test) > 10
        assert set(train) | set(val) | set(test) == set(numbers)

    def test_separate_evaluation_sources(self, files: list[str]) -> None:
        data = corpus(files[1:], eval_parts=[StreamPart(JsonLines(files[:1]))])
        val, test = (documents(data.fixed_batches(split)) for split in ("val", "test"))
        assert sorted(val + test) == [1, 2, 3, 4]
        assert not {1, 2, 3, 4} & set(documents(take(data, 40)))

    def test_the_same_on_every_call_and_sharded(self, files: list[str]) -> None:
        data = corpus(files)
        assert all(same(*pair) for pair in zip(data.fixed_batches("val"), data.fixed_batches("val"), strict=True))
        shards = [
            documents(on_trainer(corpus(files), global_rank=rank, world_size=2).fixed_batches("val")) for rank in (0, 1)
        ]
        assert sorted(shards[0] + shards[1]) == sorted(documents(data.fixed_batches("val")))

    def test_an_empty_split_is_rejected(self, tmp_path: Path) -> None:
        data = corpus([write(tmp_path / "data.jsonl", [{"text": "1 1"}])], eval_parts=None)
        empty: Split = "val" if split_of(b'{"text": "1 1"}\n'.hex()) != "val" else "test"
        with pytest.raises(ValueError, match=rf"in the {empty} split, found none.*data.eval_parts"):
            data.fixed_batches(empty)


class TestInvalidRows:
    @pytest.fixture
    def broken(self, tmp_path: Path) -> list[str]:
        path = tmp_path / "data.jsonl"
        lines = [json.dumps({"text": f"{k} {k} {k}"}) for k in (1, 2, 3)]
        path.write_text("\n".join([lines[0], '{"text": "4', lines[1], '{"words": "5"}', lines[2]]), encoding="utf-8")
        return [str(path)]

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_the_first_one_raises_an_error(self, broken: list[str], num_workers: int) -> None:
        with pytest.raises(ValueError, match=r"data.jsonl, line [24].*data.on_error: skip"):
            take(corpus(broken, num_workers=num_workers), 9)

    def test_skipped_rows_are_counted(self, broken: list[str]) -> None:
        data = corpus(broken, on_error="skip", batch_size=1)
        with pytest.warns(UserWarning, match=r"skipped 2 invalid rows so far.*line [24]"):
            assert sorted(documents(take(data, 3))) == [1, 2, 3]
        assert data.statistics.invalid == 2

    def test_a_wrong_column_is_named(self, broken: list[str]) -> None:
        parts = [StreamPart(JsonLines(broken), PromptAndCompletion("{nothing}", "{text}"))]
        with pytest.raises(ValueError, match=r"column 'nothing'.*data.parts"):
            take(corpus([], parts=parts), 1)

    def test_nothing_to_learn(self, tmp_path: Path) -> None:
        path = tmp_path / "data.txt"
        path.write_text("1 1 1 1 1 1\n")
        # The prompt fills the rows, and the completion's end stands alone.
        parts = [StreamPart(TextRows([str(path)], per="line"), PromptAndCompletion("{text}", ""))]
        with pytest.raises(ValueError, match="something to learn, found none"):
            take(corpus([], parts=parts, row_length=6), 1)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_an_empty_source(self, tmp_path: Path, num_workers: int) -> None:
        (tmp_path / "data.jsonl").touch()
        with pytest.raises(ValueError, match=r"^expected documents in JsonLines.*set part 0 of data.parts$"):
            take(corpus([str(tmp_path / "data.jsonl")], num_workers=num_workers), 1)

    def test_the_search_for_held_out_rows_ends(self, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unusable_rows, "MAX_EMPTY_BLOCKS", 1)
        data = corpus(files, parts=[StreamPart(JsonLines(files), PlainText("nothing"))], on_error="skip")
        with (
            pytest.warns(UserWarning, match="invalid rows so far"),
            pytest.raises(ValueError, match=r"found none in 2 blocks.* \d+ invalid rows \(the last one: .*'nothing'"),
        ):
            data.fixed_batches("val")

    def test_a_tokenizer_without_an_end_of_text(self, files: list[str]) -> None:
        data = corpus(files, row_length=3)
        data.tokenizer = number_tokenizer(end_of_text=False)
        rows = [row for batch in take(data, NUM_DOCUMENTS // 2) for row in batch.input_ids.tolist()]
        assert data.end_of_text is None
        assert sorted(rows) == [[k] * 3 for k in range(1, NUM_DOCUMENTS + 1)]

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_documents_without_a_completion_are_counted(self, tmp_path: Path, num_workers: int) -> None:
        unanswered = {"messages": [{"role": "user", "content": "1 1 1"}]}
        answered = {"messages": [*unanswered["messages"], {"role": "assistant", "content": "2 2"}]}
        path = write(tmp_path / "data.jsonl", [unanswered] * 3 + [answered])
        template = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
        parts = [StreamPart(JsonLines([path]), Chat(template=template))]
        data = corpus([], parts=parts, row_length=16, batch_size=1, num_workers=num_workers)
        with pytest.warns(UserWarning, match=r"3 documents so far from which nothing is learned.*its roles") as warned:
            take(data, 1)
        assert len(warned) == 1 and data.statistics.not_learned == 3

    def test_no_parts(self) -> None:
        with pytest.raises(ValueError, match="set data.parts"):
            StreamingCorpus([])

    def test_a_missing_chat_template_is_reported_before_reading(self, files: list[str]) -> None:
        with pytest.raises(ValueError, match="chat template"):
            corpus(files, parts=[StreamPart(JsonLines(files), Chat())])

    def test_split_documents_are_reported(self, files: list[str]) -> None:
        with pytest.warns(UserWarning, match="longer than a row and are split"):
            take(corpus(files, row_length=3), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            take(corpus(files, row_length=4), 1)
