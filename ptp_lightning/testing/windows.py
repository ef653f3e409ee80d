"""The contracts of `WindowSource` and `AuxiliaryStrategy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.auxiliary_strategies import AuxiliaryStrategy, ProbeResult, StudentProbe
from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.testing.contract import generator, require
from ptp_lightning.testing.tiny import SAMPLING, tiny_batch, tiny_predictor
from ptp_lightning.training.windows.window_source import WindowSample, WindowSource

SAMPLINGS = (
    SAMPLING,
    SamplingConfig(order="vocabulary"),
    SamplingConfig(temperature=0.8, top_k=12, top_p=0.9, order="embedding"),
    SamplingConfig(temperature=0),
)
NUM_SEEDS = 5


def check_window_source(
    source: WindowSource, predictor: PredictorNetwork | None = None, batch: PackedBatch | None = None
) -> None:
    """Check that a source of windows keeps the promises of its base class.

    Args:
        source: the source.
        predictor: whose windows it fills; by default tiny ones with several sampling settings.
        batch: rows with windows; by default two rows of random tokens.

    Raises:
        AssertionError: says which promise is broken.

    >>> from ptp_lightning.training import TeacherWindows
    >>> check_window_source(TeacherWindows())
    """
    batch = tiny_batch() if batch is None else batch
    predictors = [tiny_predictor(sampling=one) for one in SAMPLINGS] if predictor is None else [predictor]
    for one in predictors:
        for seed in range(NUM_SEEDS):
            _check_sample(_sample(source, one, batch, seed), one, batch)
    _check_side_effects(source, predictors[0], batch)
    first, again, other = (_sample(source, predictors[0], batch, seed) for seed in (1, 1, 2))
    require(
        torch.equal(first.auxiliaries, again.auxiliaries) and torch.equal(first.token_ids, again.token_ids),
        "expected the same windows for the same generator",
    )
    is_greedy = predictors[0].config.sampling.temperature == 0  # one token has all u, and others none
    require(
        is_greedy or not torch.equal(first.auxiliaries, other.auxiliaries),
        "expected other auxiliaries for another generator",
    )


def _sample(source: WindowSource, predictor: PredictorNetwork, batch: PackedBatch, seed: int) -> WindowSample:
    return source.sample(predictor, predictor.encode(batch), generator(seed))


def _check_sample(sample: WindowSample, predictor: PredictorNetwork, batch: PackedBatch) -> None:
    shape = (*batch.window_starts.shape, predictor.config.window_length)
    for name in ("token_ids", "auxiliaries", "mask", "conditioning_ids"):
        found = getattr(sample, name).shape
        require(found == shape, f"expected {name} of the shape {shape} (B, N, L), found {tuple(found)}")
    require(
        sample.auxiliaries.dtype == torch.float64, f"expected float64 auxiliaries, found {sample.auxiliaries.dtype}"
    )
    require(
        not (sample.mask[..., 1:] & ~sample.mask[..., :-1]).any(), "expected a mask that is true on a prefix of windows"
    )
    picked = pick(sample.auxiliaries, sample.teacher.materialize())
    require(
        torch.equal(picked[sample.mask], sample.token_ids[sample.mask]),
        "expected pick(auxiliaries, teacher) == token_ids where the mask is true",
    )
    tensors: list[Tensor | None] = [sample.auxiliaries, *sample.teacher.materialize(), *sample.target.materialize()]
    require(not any(one.requires_grad for one in tensors if one is not None), "expected a sample without gradients")


def _check_side_effects(source: WindowSource, predictor: PredictorNetwork, batch: PackedBatch) -> None:
    expected, context = predictor.encode(batch).cache, predictor.encode(batch)
    was_training = predictor.training
    predictor.train()
    modes = {name: module.training for name, module in predictor.named_modules()}
    source.sample(predictor, context, generator())
    now = {name: module.training for name, module in predictor.named_modules()}
    predictor.train(was_training)
    require(now == modes, "expected the modes (train, eval) of all modules as before")
    require(
        context.cache.get_seq_length() == batch.input_ids.shape[1],
        f"expected the cache of the context as before, {batch.input_ids.shape[1]} tokens long, found "
        f"{context.cache.get_seq_length()}",
    )
    layers: list[tuple[Any, Any]] = list(zip(context.cache.layers, expected.layers, strict=True))
    for found, before in layers:
        require(
            torch.equal(found.keys, before.keys) and torch.equal(found.values, before.values),
            "expected the keys and values of the context as before",
        )


def check_auxiliary_strategy(strategy: AuxiliaryStrategy, size: int = 64) -> None:
    """Check that a strategy keeps the promises of its base class.

    Args:
        strategy: the strategy.
        size: number of draws at a time.

    Raises:
        AssertionError: says which one is broken.

    >>> from ptp_lightning.auxiliary_strategies import BetaInInterval
    >>> check_auxiliary_strategy(BetaInInterval(0.5))
    """
    probes = (_picks_from(0.2, 0.4), _picks_from(0.0, 1.0), _picks_from(0.0, 0.0), _correct_below(0.5))
    for probe in probes:
        for lower, width in ((0.0, 1.0), (0.25, 0.5), (0.3, 2.0**-52), (1 - 2.0**-52, 2.0**-53)):
            low, high = _full(lower, size), _full(lower + width, size)
            u = strategy.draw(low, high, generator(), probe)
            require(u.dtype == torch.float64, f"expected float64 auxiliaries, found {u.dtype}")
            require(((low <= u) & (u < high)).all(), f"expected u in [{lower}, {lower + width}), found {u.aminmax()}")
        empty = strategy.draw(_full(0.0, size), _full(0.0, size), generator(), probe)
        require(torch.equal(empty, _full(0.0, size)), "expected u = lower in an empty interval")
    _check_randomness(strategy, size, probes)


def _check_randomness(strategy: AuxiliaryStrategy, size: int, probes: tuple[StudentProbe, ...]) -> None:
    lower, upper = _full(0.25, size), _full(0.75, size)
    first, again, other = (strategy.draw(lower, upper, generator(seed), probes[0]) for seed in (1, 1, 2))
    require(torch.equal(first, again), "expected the same u for the same generator")
    require(not torch.equal(first, other), "expected other u for another generator")
    after = []
    for probe in probes:
        state = generator()
        strategy.draw(lower, upper, state, probe)
        after.append(torch.rand(4, generator=state))
    require(
        all(torch.equal(after[0], one) for one in after),
        "expected a number of draws that depends on the shape alone, not on what the student answers",
    )


def _full(value: float, size: int) -> Tensor:
    return torch.full((size,), value, dtype=torch.float64)


def _picks_from(lower: float, upper: float) -> StudentProbe:
    """A student whose own interval of every given token is `[lower, upper)`."""

    def probe(auxiliaries: Tensor) -> ProbeResult:
        interval = torch.full_like(auxiliaries, lower), torch.full_like(auxiliaries, upper)
        return ProbeResult((lower <= auxiliaries) & (auxiliaries < upper), interval)

    return probe


def _correct_below(edge: float) -> StudentProbe:
    """A one-hot student that drafts the given tokens for u below the edge."""

    def probe(auxiliaries: Tensor) -> ProbeResult:
        return ProbeResult(auxiliaries < edge, None)

    return probe
