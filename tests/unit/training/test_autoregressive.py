"""AutoregressiveModule: labels, bits per byte, and the model it leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.series.markov import MarkovSeries
from ptp_lightning.data.series.series_datamodule import SeriesDataModule
from ptp_lightning.models.backbone import BackboneSettings
from ptp_lightning.training.modules.autoregressive import AutoregressiveModule, next_token_labels, token_byte_lengths
from ptp_lightning.training.optimization import OptimizerSettings
from tests.helpers.tiny_data import Texts, tiny_data

GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


def make_module(backbone: dict[str, Any] = GPT2, output: str | None = None, **settings: Any) -> AutoregressiveModule:
    torch.manual_seed(0)
    optimizer = OptimizerSettings(learning_rate=0.01, warmup_steps=1)
    return AutoregressiveModule(BackboneSettings(from_config=backbone), optimizer, output=output, **settings)


def make_trainer(directory: Path, **options: Any) -> Trainer:
    defaults = {"max_steps": 3, "num_sanity_val_steps": 0, "limit_val_batches": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=directory, **(defaults | quiet | options))


def batch_of(input_ids: list[int], document_ids: list[int], completion_mask: list[int] | None = None) -> PackedBatch:
    documents = torch.tensor([document_ids])
    positions = [document_ids[:position].count(document) for position, document in enumerate(document_ids)]
    completion = documents >= 0 if completion_mask is None else torch.tensor([completion_mask]).bool()
    return PackedBatch(
        torch.tensor([input_ids]), documents, torch.tensor([positions]), torch.ones(1, 1, dtype=torch.long), completion
    )


class TestLabels:
    def test_next_token_of_the_same_document(self) -> None:
        labels = next_token_labels(batch_of([11, 12, 13, 21, 22, 0, 0], [0, 0, 0, 1, 1, -1, -1]))
        assert labels.tolist() == [[12, 13, -100, 22, -100, -100, -100]]

    def test_the_row_does_not_go_round(self) -> None:
        assert next_token_labels(batch_of([1, 2, 3], [0, 0, 0])).tolist() == [[2, 3, -100]]

    def test_prompt_tokens_are_no_labels(self) -> None:
        labels = next_token_labels(batch_of([1, 2, 3, 4, 5], [0] * 5, completion_mask=[0, 0, 1, 1, 0]))
        assert labels.tolist() == [[-100, 3, 4, -100, -100]]


def test_a_document_is_scored_as_if_it_stood_alone() -> None:
    module = make_module().eval()
    packed = batch_of([5, 6, 7, 8, 9, 10, 11, 0], [0, 0, 0, 1, 1, 1, 1, -1])
    with torch.no_grad():
        together, labels = module._nats(packed)
        alone = [module._nats(batch_of(ids, [0] * len(ids)))[0] for ids in ([5, 6, 7], [8, 9, 10, 11])]
    torch.testing.assert_close(together.sum(), torch.cat(alone, dim=1).sum())
    assert int((labels != -100).sum()) == 2 + 3


def test_a_network_that_mixes_documents_is_refused() -> None:
    """One with state-space layers, which know no documents."""
    bamba = {"model_type": "bamba", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
    bamba |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "attn_layer_indices": [1]}
    bamba |= {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    with pytest.raises(ValueError, match=r"^[^\n]*\(bamba\)[^\n]* packed rows[^\n]*model\.init_args\.backbone[^\n]*$"):
        make_module(bamba)


def test_rows_beyond_the_positions_of_the_network_are_refused(tmp_path: Path) -> None:
    module, data = make_module(GPT2 | {"n_positions": 8}), tiny_data()
    message = f"expected data.row_length <= 8 .the model's positions., found {data.row_length}: lower data.row_length"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, datamodule=data)


def test_bytes_of_tokens() -> None:
    # In the byte-level alphabet a blank is Ġ, a line break Ċ, and é is the two letters Ã©.
    tokens = ["<|endoftext|>", "def", "Ġreturn", "Ċ", "Ã©", "<|", "<|>"]
    assert token_byte_lengths(tokens).tolist() == [0, 3, 7, 1, 2, 2, 3]


class Uniform(torch.nn.Module):
    """Every one of 32 tokens is equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = make_module().model.config

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        class Output:
            logits = torch.zeros(*input_ids.shape, 32) + self.weight

        return Output


def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    module = make_module()
    module.model = Uniform()  # pyright: ignore[reportAttributeAccessIssue]
    # Rows of 5: "aaaa" + end and "bb" + end + padding: 4 + 2 labels of 5 bits each; the ends stand for no byte: 3 + 1.
    data = tiny_data(Texts(["aaaa", "bb"]), row_length=5)
    metrics = make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]
    assert metrics["val/loss_nats"] == pytest.approx(math.log(32))
    assert metrics["val/bits_per_byte"] == pytest.approx((4 + 2) * 5 / (3 + 1))


def test_only_labels_have_bytes() -> None:
    module = make_module().eval()
    module.byte_lengths = torch.full((32,), 3)  # id 0, which stands in for missing labels, too
    module.on_validation_epoch_start()
    module.validation_step(batch_of([1, 2, 3, 0], [0, 0, 0, -1]), 0)
    assert module._sums[1:].tolist() == [2, 2 * 3]


def test_bits_per_byte_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    found = [
        make_trainer(tmp_path, limit_val_batches=1.0).validate(
            make_module(), datamodule=tiny_data(eval_rows=7, batch_size=size), verbose=False
        )[0]
        for size in (1, 4)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_fit_trains_every_weight_with_dropout(tmp_path: Path) -> None:
    module = make_module()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    modes: list[bool] = []
    module.on_train_batch_start = lambda *_: modes.append(all(child.training for child in module.model.modules()))
    make_trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert modes == [True] * 3
    unchanged = {name for name, value in module.model.named_parameters() if torch.equal(value, before[name])}
    assert not unchanged


def test_output_is_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = make_module(output=str(tmp_path / "model"))
    make_trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert "Writing model shards" not in capsys.readouterr().err  # a progress bar, also in logs
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16 and module.model.dtype == torch.float32
    for name, value in module.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == 0


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    make_trainer(tmp_path, fast_dev_run=True).fit(make_module(output=str(tmp_path / "model")), datamodule=tiny_data())
    assert not (tmp_path / "model").exists()


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 20 token ids.*found 29.*data.tokenizer"):
        make_trainer(tmp_path).fit(make_module(GPT2 | {"vocab_size": 20}), datamodule=tiny_data())


class TestSeries:
    """Data that were never text: perplexity in place of bits per byte."""

    def test_perplexity_overall_and_by_position(self, tmp_path: Path) -> None:
        series = MarkovSeries(order=1, vocab_size=5, entropy=1.0)
        data = SeriesDataModule(series, row_length=6, batch_size=4, eval_rows=7)
        module = make_module(perplexity_positions=3)
        metrics = make_trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)[0]
        rows = torch.nn.functional.pad(series.fixed_rows("val", 5, 7), (1, 0), value=5)
        with torch.no_grad():
            log_probabilities = module.model.eval()(input_ids=rows).logits.double().log_softmax(-1)
        nats = -log_probabilities[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1)
        assert metrics["val/perplexity"] == pytest.approx(float(nats.mean().exp()), rel=1e-5)
        assert metrics["val/loss_nats"] == pytest.approx(float(nats.mean()), rel=1e-5)
        expected = {f"val/perplexity/position_{j:02d}": float(nats[:, j].mean().exp()) for j in range(3)}
        found = {tag: value for tag, value in metrics.items() if "position" in tag}
        assert found == pytest.approx(expected, rel=1e-5)
        assert "val/bits_per_byte" not in metrics

    def test_positions_count_within_each_document(self) -> None:
        module = make_module(perplexity_positions=2).eval()
        module.byte_lengths = torch.zeros(32, dtype=torch.int64)
        module.on_validation_epoch_start()
        module.validation_step(batch_of([5, 6, 7, 8, 9, 10, 11, 0], [0, 0, 0, 1, 1, 1, 1, -1]), 0)
        assert module.perplexity is not None
        assert module.perplexity.counts.tolist() == [2, 2]  # the fourth token of the second document lies beyond

    def test_output_without_a_tokenizer(self, tmp_path: Path) -> None:
        module = make_module(output=str(tmp_path / "model"), output_dtype="float32")
        data = SeriesDataModule(MarkovSeries(), row_length=6, batch_size=4, eval_rows=4)
        make_trainer(tmp_path).fit(module, datamodule=data)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert all(torch.equal(model.state_dict()[name], value) for name, value in module.model.state_dict().items())
        assert not list((tmp_path / "model").glob("tokenizer*"))

    def test_the_beginning_needs_an_id_too(self, tmp_path: Path) -> None:
        data = SeriesDataModule(MarkovSeries(vocab_size=5), row_length=6)
        with pytest.raises(ValueError, match="at most 5 token ids.*found 6.*a series needs one more id"):
            make_trainer(tmp_path).fit(make_module(GPT2 | {"vocab_size": 5}), datamodule=data)

    def test_positions_are_not_negative(self) -> None:
        with pytest.raises(ValueError, match="perplexity_positions >= 0, found -1"):
            make_module(perplexity_positions=-1)
