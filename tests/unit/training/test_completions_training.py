"""Training from stored completions is training from the teacher's samples, and other teachers' are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import IterableDataset

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.completions.completions import CompletionSettings
from ptp_lightning.data.completions.completions_datamodule import CompletionsDataModule
from ptp_lightning.data.corpus import Split, split_of
from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.data.packing import PackedRow, TokenDocument, pack
from ptp_lightning.data.streaming.stream import DocumentStream, evaluation_batches
from ptp_lightning.decoding import GenerationSettings, decode_autoregressively
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.models.students import SharedStudent
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.utils.randomness import keyed_generator
from tests.helpers.tiny_completions import PROMPTS, settings_of, write_sampled
from tests.helpers.tiny_distillation import LLAMA, make_module, make_trainer, record_losses, weights

SIZES: dict[str, Any] = {
    "row_length": 20,
    "batch_size": 2,
    "num_windows": 3,
    "eval_rows": 3,
    "shuffle_rows": 4,
    "seed": 5,
}
Key = tuple[int, int]


class Sampled(DocumentStream[Key]):
    """Documents that the teacher writes when they are asked for: (prompt, completion)."""

    predictor: PredictorNetwork
    settings: CompletionSettings

    def pack_documents(self, documents: Sequence[Key]) -> Iterator[PackedRow]:
        return pack((self._write(*key) for key in documents), SIZES["row_length"], allow_split=False)

    def _write(self, prompt: int, completion: int) -> TokenDocument:
        settings = GenerationSettings(
            sampling=self.predictor.config.sampling,
            max_new_tokens=6,
            seed=self.settings.seed_of(prompt, completion),
            end_of_text=frozenset({0}),
        )
        (text,) = decode_autoregressively(self.predictor, [PROMPTS[prompt]], settings)
        mask = [False] * len(PROMPTS[prompt]) + [True] * len(text.token_ids)
        return TokenDocument([*PROMPTS[prompt], *text.token_ids], mask)


class OnTheFly(PackedDataModule):
    """No file anywhere: the teacher that is in training writes every text of every epoch again."""

    row_length = SIZES["row_length"]
    vocab_size = LLAMA["vocab_size"]
    end_of_text = 0

    def __init__(self, predictor: PredictorNetwork) -> None:
        super().__init__()
        self.predictor = predictor

    def stream(self, split: Split) -> Sampled:
        keys = [(p, c) for p in range(len(PROMPTS)) if split_of(f"prompt {p}") == split for c in range(2)]
        chosen = {name: SIZES[name] for name in ("batch_size", "num_windows", "shuffle_rows", "seed")}
        stream = Sampled(keys, **chosen, skip_batches=self.batches_consumed)
        stream.predictor, stream.settings = self.predictor, settings_of(self.predictor)
        return stream

    def training_stream(self) -> IterableDataset[PackedBatch]:
        return self.stream("train")

    def fixed_batches(self, split: Split) -> list[PackedBatch]:
        stream = self.stream(split)
        rows = list(stream.pack_documents(stream.documents))
        return evaluation_batches(rows, SIZES["eval_rows"], 2, 3, keyed_generator(SIZES["seed"], split))


def student(**predictor: Any) -> DistillationModule:
    return make_module(source=DatasetWindows(), **predictor)


def stored(path: Path, **changes: Any) -> CompletionsDataModule:
    """Completions of the teacher that `student` has by default."""
    if not path.exists():
        write_sampled(path, student().predictor, **changes)
    return CompletionsDataModule(str(path), **SIZES)


def test_the_same_numbers_as_samples_on_the_fly(tmp_path: Path) -> None:
    from_files, on_the_fly = student(), student()
    expected, found = record_losses(on_the_fly), record_losses(from_files)
    options: dict[str, Any] = {"max_steps": 12, "val_check_interval": 6, "limit_val_batches": 1.0}
    trainers = [make_trainer(tmp_path, check_val_every_n_epoch=None, **options) for _ in range(2)]
    trainers[0].fit(on_the_fly, datamodule=OnTheFly(on_the_fly.predictor))
    trainers[1].fit(from_files, datamodule=stored(tmp_path / "completions"))

    assert len(set(expected)) == 12
    assert found == expected  # bit for bit
    ours, theirs = weights(from_files), weights(on_the_fly)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    metrics = [{tag: float(value) for tag, value in trainer.callback_metrics.items()} for trainer in trainers]
    assert metrics[0] == metrics[1] and "val/correct_tokens" in metrics[0]


def test_training_takes_every_token_of_a_window_for_the_teachers_own(tmp_path: Path) -> None:
    """The teacher's distribution over the row is the one that a completion was drawn from: no token lies outside."""
    module, data = student(), stored(tmp_path / "completions")
    data.setup("fit")
    for batch in data.fixed_batches("train"):
        context = module.predictor.encode(batch, end_of_text=0)
        sample = DatasetWindows().sample(module.predictor, context, torch.Generator().manual_seed(0))
        own = batch.document_ids.gather(1, batch.window_starts)
        for row in range(len(batch.input_ids)):
            for window, start in enumerate(batch.window_starts[row].tolist()):
                left = int(((batch.document_ids[row] == own[row, window]).nonzero().max()) + 1) - start
                assert int(sample.mask[row, window].sum()) == min(left, 4)


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path) -> None:
    whole = student()
    expected = record_losses(whole)
    make_trainer(tmp_path, max_steps=8).fit(whole, datamodule=stored(tmp_path / "completions"))

    first = student()
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=3)
    # Both trainers must know how long the whole run is: the schedule depends on it.
    stop = make_trainer(tmp_path, max_steps=8, enable_checkpointing=True, callbacks=[keep])
    seen: list[float] = []

    def cut(outputs: Any, *_: Any) -> None:
        seen.append(float(outputs["loss"]))
        stop.should_stop = len(seen) == 5

    first.on_train_batch_end = cut
    stop.fit(first, datamodule=stored(tmp_path / "completions"))
    resumed = student()
    found = record_losses(resumed)
    make_trainer(tmp_path, max_steps=8).fit(
        resumed, datamodule=stored(tmp_path / "completions"), ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert seen[:3] == expected[:3] and found == expected[3:] and len(expected) == 8


class TestRefusals:
    @pytest.mark.parametrize("run", ["fit", "validate", "test"])
    def test_another_teacher(self, tmp_path: Path, run: str) -> None:
        data, module = stored(tmp_path / "completions"), make_module(source=DatasetWindows(), base_seed=1)
        expected = f"fingerprint {module.predictor.base_fingerprint}.*found.*fingerprint {data.settings.teacher}.*"
        with pytest.raises(ValueError, match=expected + "data.folder or predictor.backbone.path"):
            getattr(make_trainer(tmp_path), run)(module, datamodule=data)

    @pytest.mark.parametrize(
        "change",
        [{"temperature": 0.9}, {"top_k": 9}, {"top_p": 0.8}, {"order": "descending"}],
        ids=lambda c: next(iter(c)),
    )
    def test_other_sampling_settings(self, tmp_path: Path, change: dict[str, Any]) -> None:
        given = SamplingConfig(**({"temperature": 0.8, "top_k": 8, "top_p": 0.9} | change))
        module = student(sampling=given)
        losses = record_losses(module)
        with pytest.raises(ValueError, match="sampled with .*found .*data.folder or predictor.sampling") as refusal:
            make_trainer(tmp_path).fit(module, datamodule=stored(tmp_path / "completions"))
        name, value = next(iter(change.items()))
        assert f"{name}={value!r}" in str(refusal.value).partition("found")[0]
        assert losses == []

    def test_a_range_of_sampling_settings(self, tmp_path: Path) -> None:
        module = student(sampling_range=SamplingRange(0.5, 1.0, top_k=(4, 8)))
        with pytest.raises(ValueError, match="predictor.sampling_range to null, or set data.folder"):
            make_trainer(tmp_path).fit(module, datamodule=stored(tmp_path / "completions"))

    @pytest.mark.parametrize("vocab_size", [40, 24])
    def test_another_vocabulary(self, tmp_path: Path, vocab_size: int) -> None:
        module = make_module({**LLAMA, "vocab_size": vocab_size}, source=DatasetWindows())
        expected = f"with {vocab_size} token ids .*found 32 .*data.folder or predictor.backbone.path"
        with pytest.raises(ValueError, match=expected):
            make_trainer(tmp_path).fit(module, datamodule=stored(tmp_path / "completions"))

    def test_a_model_without_a_teacher_takes_any(self, tmp_path: Path) -> None:
        from ptp_lightning.training.modules.inverse_autoregressive import InverseAutoregressiveModule

        config = student().predictor.config
        changes = {"backbone": config.backbone, "window_length": 4, "student": SharedStudent()}
        module = InverseAutoregressiveModule(type(config)(**changes))
        make_trainer(tmp_path).fit(module, datamodule=stored(tmp_path / "completions"))
