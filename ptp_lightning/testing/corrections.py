"""The contracts of `Correction` and `Student`."""

from __future__ import annotations

import torch
from torch import Tensor

from ptp_lightning.models.correction.correction import Correction, CorrectionHead
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.students import Student
from ptp_lightning.testing.contract import generator, require, require_plain_data, uniform
from ptp_lightning.testing.tiny import HIDDEN_SIZE, VOCABULARY, WINDOW_LENGTH, WINDOW_STARTS, tiny_batch, tiny_predictor

NUM_SLOTS = WINDOW_LENGTH - 1
CHANGES = ((0, 0, 0), (0, 2, 1), (1, 1, 2), (1, 2, 3))
"""(row, window, slot) whose token is changed."""


def check_correction(correction: Correction) -> None:
    """Check that a correction keeps the promises of its base class.

    Raises:
        AssertionError: says which one is broken.

    >>> from ptp_lightning.models import MarkovHead
    >>> check_correction(MarkovHead(rank=4))
    """
    require_plain_data(correction=correction)
    _check_untrained(tiny_predictor(correction=correction, draft_vocabulary=7, untrained=True))
    predictor = tiny_predictor(correction=correction)
    _check_conditioning(predictor)
    _check_gradients(predictor)
    for one in (predictor, tiny_predictor(correction=correction, draft_vocabulary=7)):
        if isinstance(one.correction, CorrectionHead):
            _check_head(one, one.correction)


def check_student(student: Student) -> None:
    """Check that a student keeps the promises of its base class.

    Raises:
        AssertionError: says which one is broken.

    >>> from ptp_lightning.models import GatedLoraStudent
    >>> check_student(GatedLoraStudent())
    """
    require_plain_data(student=student)
    plain, predictor = tiny_predictor(untrained=True), tiny_predictor(student=student)
    batch = tiny_batch()
    with torch.no_grad():
        expected, found = (one.encode(batch).first_hidden for one in (plain, predictor))
    require(
        torch.equal(expected, found), "expected hidden states of the context with the same bits as the base model's"
    )
    require(
        not any(module.training for module in predictor.base_model.modules()), "expected the base model in eval mode"
    )
    weights = predictor.base_model.named_parameters()
    trained = [name for name, weight in weights if weight.requires_grad and ".lora_" not in name]
    require(
        bool(trained) == student.trains_base,
        f"expected trains_base to say whether weights of the base model are trained, found {student.trains_base} and "
        f"{len(trained)} trained",
    )
    predictor.slot_logits(_slot_hidden(predictor)).square().sum().backward()
    require(
        any(weight.grad is not None and weight.grad.any() for weight in predictor.parameters()),
        "expected gradients of the network that runs the slots",
    )


def _tokens() -> Tensor:
    """`[B, N, L - 1]`: tokens that slots stand for."""
    return torch.randint(VOCABULARY, (*WINDOW_STARTS.shape, NUM_SLOTS), generator=generator(1))


def _slot_hidden(predictor: PredictorNetwork) -> Tensor:
    return predictor.slot_hidden(predictor.encode(tiny_batch()), uniform(*WINDOW_STARTS.shape, WINDOW_LENGTH))


def _corrected(predictor: PredictorNetwork, tokens: Tensor) -> Tensor:
    context = predictor.encode(tiny_batch())
    hidden = predictor.slot_hidden(context, uniform(*WINDOW_STARTS.shape, WINDOW_LENGTH))
    return predictor.correct(context, predictor.correction_context(context), hidden, tokens)


@torch.no_grad()
def _check_untrained(predictor: PredictorNetwork) -> None:
    expected = predictor.slot_logits(_slot_hidden(predictor))
    require(
        torch.equal(predictor.slot_logits(_corrected(predictor, _tokens())), expected),
        "expected an untrained correction to change no logits: initialise its last layer with zeros",
    )


@torch.no_grad()
def _check_conditioning(predictor: PredictorNetwork) -> None:
    is_head = isinstance(predictor.correction, CorrectionHead)
    tokens = _tokens()
    before = _corrected(predictor, tokens)
    for row, window, slot in CHANGES:
        changed = tokens.clone()
        changed[row, window, slot] = (changed[row, window, slot] + 1) % VOCABULARY
        different = (before != _corrected(predictor, changed)).any(-1)
        expected = torch.zeros_like(different)
        expected[row, window, slot : slot + 1 if is_head else NUM_SLOTS] = True
        rule = "this slot alone" if is_head else "this slot and later ones of its window"
        require(torch.equal(different, expected), f"expected the token of a slot to change {rule}")
    pairs = predictor.correction_context(predictor.encode(tiny_batch()))
    require(not (is_head and pairs is not None), "expected a CorrectionHead to read nothing of the context")


def _check_gradients(predictor: PredictorNetwork) -> None:
    predictor.zero_grad()
    logits = predictor.slot_logits(_corrected(predictor, _tokens()))
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    trained = {name: weight for name, weight in predictor.named_parameters() if weight.requires_grad}
    require(
        any("slot_encoder.correction." in name for name in trained),
        "expected trained weights in the correction's module",
    )
    for name, weight in trained.items():
        require(weight.grad is not None and weight.grad.abs().max() > 0, f"expected a gradient of {name}, found none")


@torch.no_grad()
def _check_head(predictor: PredictorNetwork, head: CorrectionHead) -> None:
    """What is computed for all slots at once in training, and slot after slot in decoding."""
    hidden = torch.randn(2, NUM_SLOTS, HIDDEN_SIZE, generator=generator(1))
    tokens = torch.randint(VOCABULARY, (2, NUM_SLOTS), generator=generator(2))
    expected = predictor.slot_logits(head(hidden, predictor.embed(tokens)))
    next_logits = head.next_logits(hidden, predictor.slot_logits)
    found = [next_logits(slot, predictor.embed(tokens[:, slot : slot + 1])) for slot in range(NUM_SLOTS)]
    torch.testing.assert_close(
        torch.cat(found, dim=1), expected, msg=lambda text: f"next_logits differs from forward: {text}"
    )
