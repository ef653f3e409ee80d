"""CorpusDataModule: an endless, resumable stream, and fixed rows for evaluation."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.corpus import TextFiles
from ptp_lightning.data.datamodule import CorpusDataModule, TrainingStream, tokenize
from tests.helpers.tiny_data import TEXTS, Texts, tiny_data, tiny_tokenizer


def take(loader: Any, count: int) -> list[PackedBatch]:
    return list(islice(loader, count))


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return all(torch.equal(*tensors) for tensors in zip(left, right, strict=True))


def all_same(left: list[PackedBatch], right: list[PackedBatch]) -> bool:
    return all(same(*pair) for pair in zip(left, right, strict=True))


def on_trainer(data: CorpusDataModule, **state: int) -> CorpusDataModule:
    """Attach a fake trainer with this state."""
    defaults = {"global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
    data.trainer = SimpleNamespace(**(defaults | state))  # pyright: ignore[reportAttributeAccessIssue]
    return data


def test_documents_end_with_the_end_of_text_token() -> None:
    documents = list(Texts(["abc", "", "z"]).documents("train"))
    assert list(tokenize(documents, tiny_tokenizer())) == [[1, 2, 3, 0], [0], [26, 0]]
    assert list(tokenize(documents, tiny_tokenizer(end_of_text=False))) == [[1, 2, 3], [], [26]]


class TestTrainingStream:
    def test_shapes(self) -> None:
        batch = take(tiny_data().train_dataloader(), 1)[0]
        assert batch.input_ids.shape == batch.completion_mask.shape == (2, 12)
        assert batch.window_starts.shape == (2, 3)

    def test_same_seed_same_stream(self) -> None:
        first, second, other = (take(tiny_data(seed=seed).train_dataloader(), 20) for seed in (3, 3, 4))
        assert all_same(first, second)
        assert not all_same(first, other)

    def test_every_epoch_has_every_token_in_a_different_order(self) -> None:
        # 4 letters and an end make rows of one document each; with a buffer of one row, an epoch is 5 rows in a row.
        corpus = Texts(["aaaa", "bbbb", "cccc", "dddd", "eeee"])
        data = tiny_data(corpus, row_length=5, batch_size=5, shuffle_rows=1)
        epochs = [batch.input_ids[:, 0].tolist() for batch in take(data.train_dataloader(), 6)]
        assert all(sorted(epoch) == [1, 2, 3, 4, 5] for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1

    def test_a_batch_mixes_rows_of_a_long_document(self) -> None:
        text = "".join(chr(ord("a") + number // 12 % 26) for number in range(12 * 26))
        rows = [
            row.tolist()
            for batch in take(tiny_data(Texts([text]), shuffle_rows=16).train_dataloader(), 13)
            for row in batch.input_ids[:, 0]
        ]
        assert rows != sorted(rows)

    @pytest.mark.parametrize("skip", [0, 1, 7, 30])
    def test_skipping_batches_continues_exactly(self, skip: int) -> None:
        settings: dict[str, Any] = {"row_length": 9, "batch_size": 2, "num_windows": 2, "shuffle_rows": 3, "seed": 5}
        documents, tokenizer = list(Texts().documents("train")), tiny_tokenizer()
        whole = TrainingStream(documents, tokenizer, **settings)
        rest = TrainingStream(documents, tokenizer, **settings, skip_batches=skip)
        assert all_same(take(whole, skip + 5)[skip:], take(rest, 5))

    def test_ranks_partition_the_documents(self) -> None:
        seen: list[set[int]] = []
        for rank in (0, 1):
            data = on_trainer(tiny_data(end_of_text=False), global_rank=rank, world_size=2)
            stream: Any = data.train_dataloader().dataset
            seen.append({document.text for document in stream.documents})
        assert not seen[0] & seen[1]
        assert seen[0] | seen[1] == set(TEXTS)


class TestPositionInTheStream:
    def test_prefetched_batches_do_not_count(self) -> None:
        data = on_trainer(tiny_data(), global_step=3, accumulate_grad_batches=2)
        take(data.train_dataloader(), 9)  # 9 batches are read, 3 steps of 2 batches are consumed
        assert data.state_dict()["batches_consumed"] == 6

    def test_loaded_state_continues_the_stream(self) -> None:
        whole = take(tiny_data().train_dataloader(), 10)
        state = on_trainer(tiny_data(), global_step=3, accumulate_grad_batches=2).state_dict()
        resumed = on_trainer(tiny_data(), global_step=3)
        resumed.load_state_dict(state)
        assert all_same(whole[6:], take(resumed.train_dataloader(), 4))

    def test_state_survives_a_second_resume_with_other_accumulation(self) -> None:
        data = on_trainer(tiny_data(), global_step=5, accumulate_grad_batches=3)
        data.load_state_dict(on_trainer(tiny_data(), global_step=4, accumulate_grad_batches=2).state_dict())
        assert data.state_dict() == {"batches_consumed": 4 * 2 + 1 * 3, "global_step": 5}

    def test_state_without_a_trainer(self) -> None:
        data = tiny_data()
        data.load_state_dict({"batches_consumed": 7, "global_step": 7})
        assert data.state_dict() == {"batches_consumed": 7, "global_step": 7}

    def test_an_epoch_limited_by_the_trainer_does_not_start_over(self) -> None:
        data = on_trainer(tiny_data())
        loader = data.train_dataloader()
        first_epoch = take(loader, 4)
        on_trainer(data, global_step=4)
        second_epoch = take(loader, 4)
        assert all_same(first_epoch + second_epoch, take(tiny_data().train_dataloader(), 8))


class TestEvaluationRows:
    def test_fixed(self) -> None:
        data = tiny_data()
        first, again, other = (list(module.val_dataloader()) for module in (data, data, tiny_data()))
        assert all_same(first, again) and all_same(first, other)

    def test_evenly_spaced_over_the_split(self) -> None:
        letters = "abcdefghij"
        corpus = Texts(["k" * 11], held_out=[letter * 11 for letter in letters])  # 11 letters and an end: a row each
        batches = list(tiny_data(corpus, eval_rows=4, batch_size=3).val_dataloader())
        assert [batch.input_ids[:, 0].tolist() for batch in batches] == [[1, 3, 6], [8]]

    def test_fewer_rows_than_asked_for(self) -> None:
        batches = list(tiny_data(Texts(["abc"]), eval_rows=50).test_dataloader())
        assert [batch.input_ids.shape[0] for batch in batches] == [1]

    def test_validation_and_test_read_their_own_split(self) -> None:
        data = tiny_data(Texts(["aaa"], held_out=["bbb"]))
        assert all(int(batch.input_ids[0, 0]) == 2 for batch in (*data.val_dataloader(), *data.test_dataloader()))
        assert int(take(data.train_dataloader(), 1)[0].input_ids[0, 0]) == 1


class TestInvalidInput:
    @pytest.mark.parametrize("texts", [[], [""], ["", ""]])
    def test_empty_corpus(self, texts: list[str]) -> None:
        data = tiny_data(Texts(texts))
        for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
            with pytest.raises(ValueError, match="expected text in the .* split.*data.corpus"):
                loader()

    def test_advice_is_given_where_it_is_not_followed_yet(self, tmp_path: Path) -> None:
        (tmp_path / "tiny.txt").write_text("one\ntwo\n")
        for held_out, advice in (
            ("hash", r"set data\.corpus \(for a corpus of few files, set data\.corpus\.held_out: lines\)"),
            ("lines", r"set data\.corpus\.paths to files of 20 lines or more"),
        ):
            data = tiny_data(TextFiles([str(tmp_path / "tiny.txt")], held_out=held_out))  # pyright: ignore[reportArgumentType]
            with pytest.raises(ValueError, match=rf"expected text in the val split [^\n]* without text: {advice}$"):
                data.val_dataloader()

    def test_documents_shorter_than_two_tokens(self) -> None:
        data = tiny_data(Texts(["a", "b"]), end_of_text=False)
        with pytest.raises(ValueError, match="two or more tokens in the train split.*data.corpus"):
            next(iter(data.train_dataloader()))
        with pytest.raises(ValueError, match="two or more tokens in the val split.*data.corpus"):
            data.val_dataloader()

    def test_more_ranks_than_documents(self) -> None:
        data = on_trainer(tiny_data(Texts(["abc"])), global_rank=1, world_size=2)
        with pytest.raises(ValueError, match="data.corpus"):
            next(iter(data.train_dataloader()))

    @pytest.mark.parametrize(
        ("key", "value"), [("row_length", 1), ("batch_size", 0), ("num_windows", 0), ("eval_rows", -1)]
    )
    def test_sizes(self, key: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"data.{key} >= .*{value}"):
            tiny_data(**{key: value})

    def test_more_windows_than_tokens(self) -> None:
        tiny_data(row_length=9, num_windows=9)
        with pytest.raises(ValueError, match=r"data.num_windows <= data.row_length, found 10 and 9"):
            tiny_data(row_length=9, num_windows=10)

    def test_loader_before_setup(self) -> None:
        with pytest.raises(RuntimeError, match="setup"):
            CorpusDataModule(Texts()).train_dataloader()

    def test_setup_loads_the_embedded_tokenizer(self) -> None:
        data = CorpusDataModule(Texts())
        data.setup("fit")
        assert data.tokenizer is not None and len(data.tokenizer) == 2048


def test_ranks_evaluate_equally_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise ranks that share a sharded network would wait for each other. Lightning must not shard them again."""
    data = on_trainer(tiny_data(eval_rows=7))
    assert len(data.val_dataloader()) == 4

    def gather(counts: list[int], own: int) -> None:
        counts[:] = [own, 3]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    loader: Any = data.val_dataloader()
    assert all_same(loader.dataset, data.fixed_batches("val")[:3])
    assert list(loader.sampler) == [0, 1, 2]
    assert isinstance(loader.sampler, DistributedSampler)  # which Lightning does not replace
    assert len(data.test_dataloader()) == 3
