"""The contracts of `Loss` and `PositionWeights`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ptp_lightning.losses import OBJECTIVES, Loss, PositionWeights, SlotTargets
from ptp_lightning.sampling import SamplingConfig, TokenDistribution
from ptp_lightning.testing.contract import generator, require

NUM_SLOTS, HIDDEN_SIZE, VOCABULARY = 13, 5, 11
WEIGHTS = (1, 1, 0, 1, 0.5, 1, 0, 0, 1, 1, 2, 1, 1)
CHUNK_SIZES = (1, 3, 9, 10, 11)  # 10 slots count: dividing, not dividing, exact, beyond
MASK = ((True, True, True), (True, True, False), (False, False, False))


def check_loss(loss: Loss) -> None:
    """Check that a loss keeps the promises of its base class.

    Raises:
        AssertionError: says which one is broken.

    >>> from ptp_lightning.losses import TotalVariation
    >>> check_loss(TotalVariation())
    """
    for name in sorted(OBJECTIVES - loss.sound_for):
        require(name in loss.unsound_because, f"expected {name!r} in sound_for or, with the reason, in unsound_because")
    _check_gradients(loss)
    _check_chunks(loss)
    _check_mask(loss)


def check_position_weights(weights: PositionWeights) -> None:
    """Check that weights of positions keep the promises of their base class.

    Raises:
        AssertionError: says which one is broken.

    >>> from ptp_lightning.losses import GeometricWeights
    >>> check_position_weights(GeometricWeights(decay=0.5))
    """
    mask = torch.tensor(MASK)
    correct = torch.rand(mask.shape, generator=generator()).masked_fill(~mask, math.nan).requires_grad_()
    given = correct if weights.needs_correct_probability else None
    found = weights(mask, given)
    require(found.shape == mask.shape, f"expected the shape {tuple(mask.shape)}, found {tuple(found.shape)}")
    require(found.dtype == torch.float32, f"expected float32, found {found.dtype}")
    require(not found.requires_grad, "expected weights without a gradient")
    require((found[~mask] == 0).all(), "expected 0 where the mask is false")
    require((found.isfinite() & (found >= 0)).all(), f"expected finite weights that are not negative, found {found}")
    require((found[:2, 0] == 1).all(), f"expected 1 for the first slot of a window, found {found[:2, 0].tolist()}")
    shaped = weights(mask.view(3, 1, 3), None if given is None else given.view(3, 1, 3))
    require(torch.equal(shaped.view(3, 3), found), "expected the same weights for any shape of windows")


def _targets() -> SlotTargets:
    config = SamplingConfig(temperature=0.7, top_k=6, top_p=0.9)
    source = generator(1)
    target = config.distribution(3 * torch.randn(NUM_SLOTS, VOCABULARY, generator=source))
    return SlotTargets(torch.randint(VOCABULARY, (NUM_SLOTS,), generator=source), target, torch.tensor(WEIGHTS))


def _logits() -> Tensor:
    return 2 * torch.randn(NUM_SLOTS, VOCABULARY, generator=generator(2))


def _identity(hidden: Tensor) -> Tensor:
    """A head for hidden states that are the logits."""
    return hidden


def _check_gradients(loss: Loss) -> None:
    """`with_gradients` against autograd through `per_slot`, also for logits that are nearly certain or far from 0."""
    token_ids, target, _ = _targets()
    assert isinstance(target, TokenDistribution)
    logits = _logits()
    logits[0] *= 50
    logits[1] += 1000
    leaf = logits.clone().requires_grad_()
    expected = loss.per_slot(leaf, token_ids, target)
    require(expected.shape == (NUM_SLOTS,), f"expected one number for each slot, found {tuple(expected.shape)}")
    require(expected.isfinite().all(), f"expected finite losses, found {expected}")
    (gradients,) = torch.autograd.grad(expected.sum(), leaf)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full_like(logits, math.nan, dtype=dtype)
        found = loss.with_gradients(logits, token_ids, target, out)
        for name, one, other in (("values", found, expected.detach()), ("gradients", out, gradients.to(dtype))):
            torch.testing.assert_close(
                one, other, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name} of with_gradients: {text}"
            )


def _check_chunks(loss: Loss) -> None:
    targets = _targets()
    hidden = torch.randn(NUM_SLOTS, HIDDEN_SIZE, generator=generator(4))
    results = []
    for size in (1000, *CHUNK_SIZES):
        leaf = hidden.clone().requires_grad_()
        head = torch.nn.Linear(HIDDEN_SIZE, VOCABULARY)
        torch.nn.init.constant_(head.bias, 0.1)
        torch.nn.init.eye_(head.weight)
        total, count = replace(loss, chunk_size=size)(leaf, head, targets)
        (total / count).backward()
        results.append((total.detach(), count, leaf.grad, head.weight.grad, head.bias.grad))
    for size, result in zip(CHUNK_SIZES, results[1:], strict=True):
        for chunked, whole in zip(result, results[0], strict=True):
            torch.testing.assert_close(
                chunked, whole, rtol=1e-5, atol=1e-6, msg=lambda text, size=size: f"chunk_size {size}: {text}"
            )


def _check_mask(loss: Loss) -> None:
    token_ids, target, weights = _targets()
    assert isinstance(target, TokenDistribution)
    masked = weights == 0
    clean = _logits().requires_grad_()
    expected = loss(clean, _identity, SlotTargets(token_ids, target, weights))
    expected.total.backward()
    require(expected.count == weights.sum(), f"expected the sum of weights as count, found {expected.count}")
    for garbage in (1e30, math.inf, math.nan):
        dirty = clean.detach().masked_fill(masked[:, None], garbage).requires_grad_()
        probabilities = target.probabilities.masked_fill(masked[:, None], math.nan)
        targets = SlotTargets(
            token_ids.masked_fill(masked, -100), target._replace(probabilities=probabilities), weights
        )
        found = loss(dirty, _identity, targets)
        found.total.backward()
        assert dirty.grad is not None and clean.grad is not None
        require(
            found.total == expected.total
            and found.count == expected.count
            and torch.equal(dirty.grad.masked_fill(masked[:, None], 0), clean.grad)
            and not dirty.grad[masked].any(),
            f"expected slots of weight 0 to contribute nothing, found another loss for logits of {garbage} there",
        )
