"""CompletionsDataModule: windows on completions, splits by prompt, and a stream that can be continued."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.completions.completions_datamodule import CompletionsDataModule
from tests.helpers.tiny_completions import PROMPTS, TEST_PROMPTS, VAL_PROMPTS, write_synthetic

LONGEST = 3 + 4  # tokens of a prompt and its synthetic completion


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_synthetic(tmp_path / "completions")
    return tmp_path / "completions"


def tiny_data(folder: Path, **settings: Any) -> CompletionsDataModule:
    defaults = {"row_length": 12, "batch_size": 2, "num_windows": 3, "eval_rows": 4, "shuffle_rows": 4}
    data = CompletionsDataModule(str(folder), **(defaults | settings))
    data.setup("fit")
    return data


def take(loader: Any, count: int) -> list[PackedBatch]:
    return list(islice(loader, count))


def all_same(left: list[PackedBatch], right: list[PackedBatch]) -> bool:
    return all(torch.equal(*tensors) for pair in zip(left, right, strict=True) for tensors in zip(*pair, strict=True))


def documents(batches: list[PackedBatch]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every document."""
    found: list[tuple[list[int], list[int]]] = []
    for batch in batches:
        for ids, numbers, is_text in zip(batch.input_ids, batch.document_ids, batch.completion_mask, strict=True):
            for number in range(int(numbers.max()) + 1):
                own = numbers == number
                found.append((ids[own & ~is_text].tolist(), ids[own & is_text].tolist()))
    return found


def prompts_in(batches: list[PackedBatch]) -> set[int]:
    """Numbers of the prompts, with which synthetic completions begin."""
    return {completion[0] for _, completion in documents(batches)}


def test_documents_are_prompts_with_their_completions_and_nothing_else(folder: Path) -> None:
    found = documents(take(tiny_data(folder).train_dataloader(), 20))
    for prompt, completion in found:
        assert prompt == PROMPTS[completion[0]] and completion[:2] * 2 == completion


def test_windows_start_on_completion_tokens_with_a_context(folder: Path) -> None:
    starts_seen: set[int] = set()
    for batch in take(tiny_data(folder).train_dataloader(), 30):
        assert batch.completion_mask.gather(1, batch.window_starts).all()
        positions = batch.position_ids.gather(1, batch.window_starts)
        assert (positions >= 1).all()
        starts_seen |= set(positions.flatten().tolist())
    assert starts_seen == set(range(1, LONGEST))  # after a prompt of one token, up to the last of the longest


def test_all_completions_of_a_prompt_are_in_its_split(folder: Path) -> None:
    data = tiny_data(folder, eval_rows=100)
    train = take(data.train_dataloader(), 60)
    val, test = list(data.val_dataloader()), list(data.test_dataloader())
    assert prompts_in(val) == VAL_PROMPTS and prompts_in(test) == TEST_PROMPTS
    assert prompts_in(train) == set(range(len(PROMPTS))) - VAL_PROMPTS - TEST_PROMPTS
    for batches in (val, test):
        assert sorted(completion[1] for _, completion in documents(batches)) == [0, 0, 1, 1]


def test_every_epoch_holds_every_completion(folder: Path) -> None:
    # Rows of one document each; with a buffer of one row, 32 rows in a row are an epoch.
    data = tiny_data(folder, row_length=LONGEST, batch_size=32, shuffle_rows=1)
    epochs = [[tuple(text[:2]) for _, text in documents([batch])] for batch in take(data.train_dataloader(), 3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 32 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize("skip", [0, 1, 7, 30])
def test_skipping_batches_continues_exactly(folder: Path, skip: int) -> None:
    whole = take(tiny_data(folder).train_dataloader(), skip + 5)
    rest = tiny_data(folder)
    rest.load_state_dict({"batches_consumed": skip, "global_step": skip})
    assert all_same(whole[skip:], take(rest.train_dataloader(), 5))


def test_same_seed_same_stream(folder: Path) -> None:
    first, second, other = (take(tiny_data(folder, seed=seed).train_dataloader(), 10) for seed in (3, 3, 4))
    assert all_same(first, second) and not all_same(first, other)


def test_fixed_rows_are_the_same_on_every_call(folder: Path) -> None:
    data = tiny_data(folder)
    assert all_same(list(data.val_dataloader()), list(tiny_data(folder).val_dataloader()))
    assert all_same(list(data.val_dataloader()), list(data.val_dataloader()))


def test_ranks_partition_the_completions(folder: Path) -> None:
    seen: list[set[int]] = []
    for rank in (0, 1):
        data = tiny_data(folder)
        data.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
            global_step=0, accumulate_grad_batches=1, global_rank=rank, world_size=2
        )
        stream: Any = data.train_dataloader().dataset
        seen.append(set(stream.documents))
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 32


def test_what_the_folder_states(folder: Path) -> None:
    data = tiny_data(folder)
    assert (data.vocab_size, data.end_of_text, data.tokenizer) == (32, 0, None)
    assert data.settings.sampling.temperature == 0.7


class TestRefusals:
    def test_an_incomplete_folder(self, tmp_path: Path) -> None:
        write_synthetic(tmp_path, shards=[1])
        expected = f"expected 3 shards .*{tmp_path}, found 1: .*pregenerate --output {tmp_path}.*data.allow_incomplete"
        with pytest.raises(ValueError, match=expected):
            CompletionsDataModule(str(tmp_path))
        data = tiny_data(tmp_path, allow_incomplete=True)
        assert prompts_in(take(data.train_dataloader(), 30)) == set(range(8, 16)) - VAL_PROMPTS

    def test_a_folder_without_completions(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="data.folder"):
            CompletionsDataModule(str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match="found an empty folder: set data.folder"):
            CompletionsDataModule(str(tmp_path))

    def test_a_row_too_short_for_a_completion(self, folder: Path) -> None:
        assert tiny_data(folder, row_length=LONGEST)
        with pytest.raises(ValueError, match=f"data.row_length >= {LONGEST}, .*, found {LONGEST - 1}"):
            tiny_data(folder, row_length=LONGEST - 1)

    def test_a_split_without_prompts(self, tmp_path: Path) -> None:
        write_synthetic(tmp_path, num_prompts=5)
        data = tiny_data(tmp_path)
        with pytest.raises(ValueError, match="expected completions in the val split .*found 0 prompts.*data.folder"):
            data.val_dataloader()

    @pytest.mark.parametrize(("key", "value"), [("row_length", 1), ("batch_size", 0), ("eval_rows", -1)])
    def test_sizes(self, folder: Path, key: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"data.{key} >= .*{value}"):
            tiny_data(folder, **{key: value})

    def test_loader_before_setup(self, folder: Path) -> None:
        with pytest.raises(RuntimeError, match="setup"):
            CompletionsDataModule(str(folder)).train_dataloader()

    def test_a_tokenizer_that_has_moved(self, tmp_path: Path) -> None:
        write_synthetic(tmp_path, tokenizer="./gone")
        with pytest.raises(FileNotFoundError, match="gone.*data.tokenizer"):
            tiny_data(tmp_path)
        assert len(tiny_data(tmp_path, tokenizer="embedded").tokenizer or []) == 2048
