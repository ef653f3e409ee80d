"""N-grams of a predictor: where they come from, and how they are stored."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptp_lightning.export.checkpoint import load_network, save_network
from ptp_lightning.export.stored_sizes import require_stored_sizes
from ptp_lightning.models import PredictorConfig
from ptp_lightning.models.stored_state import NGRAM_PROBABILITIES, NGRAM_TOKEN_IDS
from ptp_lightning.ngrams import Ngrams, count_ngrams
from ptp_lightning.training.modules.distillation import DistillationModule
from tests.helpers.stored_predictors import trained
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import make_module, make_trainer

SIZE = 12
NGRAMS = Ngrams(torch.tensor([[-1, 3, 4], [3, 4, 5]] * 6).int(), torch.tensor([0.5, 0.25] * 6).half())


def table_of(module: DistillationModule) -> Ngrams:
    table = module.predictor.slot_encoder.ngrams
    assert table is not None and table.is_set
    return Ngrams(table.token_ids, table.probabilities)


def test_they_are_counted_in_the_training_data(tmp_path: Path) -> None:
    module, data = make_module(ngrams=SIZE), tiny_data()
    assert module.predictor.continuations == {}
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    expected = count_ngrams(data.training_texts(), SIZE)
    assert (expected.token_ids >= 0).any()
    assert torch.equal(table_of(module).token_ids, expected.token_ids)
    assert module.predictor.continuations == expected.continuations()


def test_a_resumed_training_takes_those_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_module(ngrams=SIZE)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(first, datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, data = make_module(ngrams=SIZE), tiny_data()
    monkeypatch.setattr(data, "training_texts", lambda: pytest.fail("counted again"))
    make_trainer(tmp_path, max_steps=2).fit(second, datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(table_of(second).token_ids, table_of(first).token_ids)
    assert second.predictor.continuations == first.predictor.continuations


def test_a_resumed_training_may_begin_to_have_them(tmp_path: Path) -> None:
    first = make_module()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(first, datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, data = make_module(ngrams=SIZE), tiny_data()
    make_trainer(tmp_path, max_steps=2).fit(second, datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(table_of(second).token_ids, count_ngrams(data.training_texts(), SIZE).token_ids)


def test_they_are_stored_with_the_adapter(base: Path, tmp_path: Path) -> None:
    network = trained(base, ngrams=SIZE)
    assert network.continuations == {}
    assert network.slot_encoder.ngrams is not None
    network.slot_encoder.ngrams.set(NGRAMS)
    save_network(network, tmp_path / "adapter", dtype=torch.bfloat16)
    opened = load_network(tmp_path / "adapter")
    assert opened.config == network.config
    assert opened.continuations == network.continuations == NGRAMS.continuations()
    assert torch.equal(opened.trainable_state()[NGRAM_TOKEN_IDS], NGRAMS.token_ids)


def test_what_is_no_table_is_refused(base: Path) -> None:
    network = trained(base, ngrams=SIZE)
    state = network.trainable_state()
    for name, value in (
        (NGRAM_TOKEN_IDS, torch.full((SIZE, 3), 10**6)),
        (NGRAM_PROBABILITIES, torch.full((SIZE,), torch.nan)),
    ):
        with pytest.raises(ValueError, match="expected n-grams of token ids below 64 and probabilities"):
            network.load_trainable_state(state | {name: value})
    with pytest.raises(ValueError, match=r"differs in .*ngrams.*set .*predictor.ngrams"):
        trained(base).load_trainable_state(state)
    with pytest.raises(ValueError, match=r"expected predictor.ngrams as in the stored weights, 12, found 10000$"):
        require_stored_sizes(state, replace(network.config, ngrams=10**4))


@pytest.mark.parametrize("size", [0, 10**13])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^expected predictor.ngrams null or in 1 .. \d+, found {size}$"):
        PredictorConfig(ngrams=size)
