"""Training with a draft vocabulary: where its tokens come from, what the loss reads, and what is stored."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.export.checkpoint import load_network, save_network
from ptp_lightning.export.stored_sizes import require_stored_sizes
from ptp_lightning.losses import AcceptedLengthWeights, CrossEntropy, KullbackLeibler, Loss, UniformWeights
from ptp_lightning.models import (
    CategoricalObjective,
    FullCopyStudent,
    GatedLoraStudent,
    MarkovHead,
    OneHotObjective,
    TokenConditionedHead,
)
from ptp_lightning.models.correction.correction import Correction
from ptp_lightning.models.output_head import output_head
from ptp_lightning.models.stored_state import DRAFT_TOKEN_IDS
from ptp_lightning.training.modules.distillation import DistillationModule
from tests.helpers.stored_predictors import slot_logits, trained
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import make_module, make_trainer, record_losses

SIZE = 6
HEAD = TokenConditionedHead(intermediate_size=8)


def with_vocabulary(**more: Any) -> DistillationModule:
    return make_module(**({"correction": HEAD, "draft_vocabulary": SIZE} | more))


def token_ids(module: DistillationModule) -> list[int]:
    ids = module.predictor.slot_encoder.draft_token_ids
    assert ids is not None and ids.dtype == torch.int32
    return ids.tolist()


def test_the_most_frequent_tokens_of_the_training_data(tmp_path: Path) -> None:
    module, data = with_vocabulary(), tiny_data()
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    counts = Counter(token for text in data.training_texts() for token in text)
    expected = sorted(sorted(counts, key=lambda token: (-counts[token], token))[:SIZE])
    assert token_ids(module) == expected
    assert module.predictor.draft_head is not None and module.predictor.draft_head.rows is not None
    rows = output_head(module.predictor.base_model).weight[expected]  # pyright: ignore[reportArgumentType]
    assert torch.equal(module.predictor.draft_head.rows.weight, rows)


def test_a_resumed_training_takes_those_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not count again, and its losses are those of a training that was not interrupted."""
    whole = with_vocabulary()
    expected = record_losses(whole)
    make_trainer(tmp_path, max_steps=3).fit(whole, datamodule=tiny_data())
    first = with_vocabulary()
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(first, datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    second, data = with_vocabulary(), tiny_data()
    monkeypatch.setattr(data, "training_texts", lambda: pytest.fail("counted again"))
    losses = record_losses(second)
    make_trainer(tmp_path, max_steps=3).fit(second, datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"))
    assert token_ids(second) == token_ids(first) == token_ids(whole)
    assert losses[-1] == pytest.approx(expected[-1], abs=1e-6)


@pytest.mark.parametrize("correction", [HEAD, MarkovHead(rank=3)])
def test_it_is_stored_with_the_adapter(base: Path, tmp_path: Path, correction: Correction) -> None:
    network = trained(base, correction=correction, draft_vocabulary=SIZE)
    network.choose_draft_vocabulary(torch.tensor([0, 3, 7, 20, 21, 40]))
    save_network(network, tmp_path / "adapter")
    opened = load_network(tmp_path / "adapter")
    assert opened.config == network.config
    assert opened.trainable_state()[DRAFT_TOKEN_IDS].tolist() == [0, 3, 7, 20, 21, 40]
    assert torch.equal(slot_logits(opened), slot_logits(network))
    damaged = network.trainable_state() | {DRAFT_TOKEN_IDS: torch.tensor([3, 2, 1, 0, 4, 5])}
    with pytest.raises(ValueError, match="a draft vocabulary of 6 ascending token ids below 64, found 6 numbers"):
        network.load_trainable_state(damaged)
    with pytest.raises(ValueError, match=r"differs in .*draft_token_ids.*set .*predictor.draft_vocabulary"):
        trained(base, correction=correction).load_trainable_state(network.trainable_state())


@pytest.mark.parametrize(
    ("correction", "changes", "key"),
    [
        (HEAD, {"draft_vocabulary": 10**12}, "draft_vocabulary"),
        (HEAD, {"correction": TokenConditionedHead(10**12)}, "correction.init_args.intermediate_size"),
        (MarkovHead(rank=3), {"correction": MarkovHead(10**12)}, "correction.init_args.rank"),
    ],
    ids=["draft vocabulary", "token-conditioned", "markov"],
)
def test_declared_sizes_without_weights_are_refused(
    base: Path, correction: Correction, changes: dict[str, Any], key: str
) -> None:
    network = trained(base, correction=correction, draft_vocabulary=SIZE)
    require_stored_sizes(network.trainable_state(), network.config)
    with pytest.raises(ValueError, match=rf"expected predictor\.{key} as in the stored weights, \d+, found 10{{12}}$"):
        require_stored_sizes(network.trainable_state(), replace(network.config, **changes))


@pytest.mark.parametrize("correction", [None, HEAD, MarkovHead(rank=3), TokenConditionedHead(8, order="parallel")])
@pytest.mark.parametrize(
    ("objective", "loss"), [(CategoricalObjective(), KullbackLeibler()), (OneHotObjective(), CrossEntropy())]
)
def test_slots_never_have_logits_of_all_tokens(
    tmp_path: Path, correction: Correction | None, objective: Any, loss: Loss
) -> None:
    """The teacher's head runs for contexts and windows of the teacher; slots have their own, smaller one."""
    module = with_vocabulary(correction=correction, objective=objective, loss=loss, draft_vocabulary=24)
    sizes: set[int] = set()
    slot_logits = module.predictor.slot_logits

    def recording(slots: Tensor) -> Tensor:
        calls: list[object] = []
        handle = output_head(module.predictor.base_model).register_forward_hook(lambda *_: calls.append(_))
        logits = slot_logits(slots)
        handle.remove()
        assert not calls
        sizes.add(logits.shape[-1])
        return logits

    module.predictor.slot_logits = recording
    losses = record_losses(module)
    make_trainer(tmp_path, val_check_interval=2).fit(module, datamodule=tiny_data())
    assert sizes == {24} and all(nats > 0 for nats in losses)


@pytest.mark.parametrize("student", [GatedLoraStudent(), FullCopyStudent()])
@pytest.mark.parametrize("weights", [UniformWeights(), AcceptedLengthWeights()])
def test_validation_counts_other_tokens_as_wrong(tmp_path: Path, student: Any, weights: Any) -> None:
    """The same samples of the teacher as with all tokens; no draft holds another token."""
    module = with_vocabulary(student=student, position_weights=weights)
    trainer = make_trainer(tmp_path, val_check_interval=2)
    trainer.fit(module, datamodule=tiny_data())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 1 <= metrics["val/correct_tokens"] < 4
    perplexities = [value for name, value in metrics.items() if "perplexity" in name]
    assert perplexities and all(1 <= value < float("inf") for value in perplexities)
    assert all(value >= 0 for name, value in metrics.items() if "val/kl/" in name)


def test_all_tokens_in_the_vocabulary_change_nothing(tmp_path: Path) -> None:
    """With N = V losses are those without a draft vocabulary."""
    found = []
    for size in (None, 32):
        module = with_vocabulary(draft_vocabulary=size)
        found.append(record_losses(module))
        make_trainer(tmp_path).fit(module, datamodule=tiny_data())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predictor.draft_vocabulary null or <= 32 \(all tokens\), found 33"):
        with_vocabulary(draft_vocabulary=33)
    with pytest.raises(ValueError, match=r"predictor.draft_vocabulary null or <= 32 \(all tokens\), found 10{13}"):
        with_vocabulary(draft_vocabulary=10**13, correction=MarkovHead(rank=3))  # whose size is that of the vocabulary
    with pytest.raises(ValueError, match=r"predictor.draft_vocabulary null or >= 1, found 0"):
        with_vocabulary(draft_vocabulary=0)
