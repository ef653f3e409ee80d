"""Activation checkpointing gives the same gradients with a cache and a gate, and saves less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.models import DecoderRefiner, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.layers.activation_checkpointing import checkpoint_layers
from ptp_lightning.models.layers.decoder_layers import decoder_layers
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_predictors import STUDENTS
from tests.helpers.tiny_shared_students import make_batch

LENGTH = 5


def make_predictor(family: str, student: str, checkpointed: bool) -> PredictorNetwork:
    """Trained a little, with a refiner where that is possible, and dropout in the adapter."""
    torch.manual_seed(1)
    refiner = None if student == "shared" else DecoderRefiner(num_layers=1)
    lora = LoraSettings(rank=4, dropout=0.5)
    config = PredictorConfig(lora=lora, window_length=LENGTH, correction=refiner, student=STUDENTS[student])
    predictor = PredictorNetwork(config, TINY_MODELS[family](vocab_size=30))
    for parameter in predictor.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointed:
        copy = predictor.student_copy
        models = [predictor.base_model] if copy is None else [predictor.base_model, copy]
        layers = decoder_layers(models, "")
        checkpoint_layers(layers if predictor.refiner is None else [*layers, *predictor.refiner.layers], predictor.gate)
    return predictor


def loss(predictor: PredictorNetwork, auxiliaries: Tensor) -> Tensor:
    """Of slots after a context, twice with the same cache, refined if possible."""
    context = predictor.encode(make_batch())
    hidden = predictor.slot_hidden(context, auxiliaries)
    again = predictor.slot_hidden(context, 1 - auxiliaries)
    if predictor.refiner is not None:
        pairs = predictor.correction_context(context)
        hidden = predictor.correct(context, pairs, hidden, auxiliaries[..., 1:].mul(30).long())
    assert context.cache.get_seq_length() == make_batch().input_ids.shape[1]
    return predictor.slot_logits(hidden + 2 * again).logsumexp(-1).sum()


def gradients(predictor: PredictorNetwork) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in predictor.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("student", STUDENTS)
def test_gradients_are_the_same(family: str, student: str) -> None:
    auxiliaries = torch.rand(*make_batch().window_starts.shape, LENGTH, dtype=torch.float64)
    found, saved = [], []
    for checkpointed in (False, True):
        predictor = make_predictor(family, student, checkpointed)
        sizes: list[int] = []
        torch.manual_seed(2)  # of the dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()) or x, lambda x: x):
            value = loss(predictor, auxiliaries)
        saved.append(sum(sizes))
        value.backward(retain_graph=True)
        value.backward()  # layers are computed a third time, with a cache that has grown meanwhile
        found.append((value.detach(), gradients(predictor)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert saved[1] < 0.6 * saved[0]


def test_nothing_is_kept_without_gradients() -> None:
    predictor = make_predictor("llama", "gated_lora", checkpointed=True)
    with torch.no_grad():
        hidden = predictor.slot_hidden(predictor.encode(make_batch()), torch.rand(2, 3, LENGTH, dtype=torch.float64))
    assert not hidden.requires_grad
