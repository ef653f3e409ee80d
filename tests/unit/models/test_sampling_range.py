"""One adapter for many sampling settings: what is drawn, what slots are conditioned on, and what must not change."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.models import PredictorConfig, PredictorNetwork
from ptp_lightning.models.slots.sampling_encoder import SamplingEncoder
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.tiny_predictors import tiny_predictor
from tests.helpers.tiny_windows import DOCUMENT_IDS, WINDOW_STARTS, make_batch

RANGE = SamplingRange(0.4, 1.0, greedy_probability=0.25, top_k=(5, 50, None), top_p=(0.8, 1.0))
BASE = SamplingConfig(0.7, 50, 0.9, "descending")


def draws(count: int, seed: int = 0, sampling_range: SamplingRange = RANGE) -> list[SamplingConfig]:
    generator = torch.Generator().manual_seed(seed)
    return [sampling_range.draw(BASE, generator) for _ in range(count)]


class TestRange:
    def test_draws_are_reproducible(self) -> None:
        assert draws(20) == draws(20)
        assert draws(20) != draws(20, seed=1)

    def test_draws_follow_the_settings(self) -> None:
        settings = draws(6000)
        temperatures = torch.tensor([config.temperature for config in settings])
        warm = temperatures[temperatures > 0]
        assert ((warm >= 0.4) & (warm < 1.0)).all()
        # Four standard deviations of each frequency.
        assert abs(len(warm) / 6000 - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 6000)
        assert abs(float(warm.mean()) - 0.7) < 4 * (0.6 / math.sqrt(12)) / math.sqrt(len(warm))
        for key, choices in (("top_k", RANGE.top_k), ("top_p", RANGE.top_p)):
            counts = Counter(getattr(config, key) for config in settings)
            assert counts.keys() == set(choices)
            share = 1 / len(choices)
            spread = 4 * math.sqrt(share * (1 - share) / 6000)
            assert all(abs(count / 6000 - share) < spread for count in counts.values())
        assert {config.order for config in settings} == {"descending"}

    def test_all_draws_are_covered(self) -> None:
        assert all(RANGE.covers(config) for config in draws(200))

    @pytest.mark.parametrize(
        ("change", "covered"),
        [
            ({}, True),
            ({"temperature": 0.39}, False),
            ({"temperature": 1.01}, False),
            ({"temperature": 0.0, "top_k": 1}, True),
            ({"top_k": 4}, False),
            ({"top_k": 70}, True),
            ({"top_k": None}, True),
            ({"top_p": 0.79}, False),
        ],
    )
    def test_covers(self, change: dict[str, Any], covered: bool) -> None:
        assert RANGE.covers(replace(BASE, **change)) == covered

    def test_one_setting_alone_covers_itself(self) -> None:
        alone = SamplingRange(0.7, 0.7, 0.0, (50,), (0.9,))
        assert alone.covers(BASE) and draws(3, sampling_range=alone) == [BASE] * 3
        assert not alone.covers(replace(BASE, temperature=0.0))
        assert not SamplingRange(0.7, 0.7, 1.0).covers(BASE)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"min_temperature": 0.0}, "min_temperature"),
            ({"min_temperature": 1.3}, "min_temperature <= .*max_temperature, found 1.3 and 1.2"),
            ({"min_temperature": 1e-9}, "sampling_range: temperature"),
            ({"max_temperature": math.inf}, "sampling_range: temperature"),
            ({"max_temperature": math.nan}, "max_temperature"),
            ({"greedy_probability": 1.1}, "greedy_probability"),
            ({"greedy_probability": math.nan}, "greedy_probability"),
            ({"top_k": ()}, "top_k, found \\[\\]"),
            ({"top_k": (5, 5)}, "different choices in predictor.sampling_range.top_k"),
            ({"top_k": (5, 0)}, "sampling_range: top_k"),
            ({"top_p": ()}, "top_p"),
            ({"top_p": (0.5, 1.5)}, "sampling_range: top_p"),
        ],
    )
    def test_nonsense_is_refused(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SamplingRange(**values)

    def test_usual_settings_outside_the_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="predictor.sampling, .* within predictor.sampling_range.*temperature=2"):
            PredictorConfig(sampling=SamplingConfig(2.0, 50, 0.8), sampling_range=RANGE)

    def test_plain_data_and_back(self) -> None:
        for config in (PredictorConfig(sampling=BASE, sampling_range=RANGE), PredictorConfig()):
            assert PredictorConfig.from_dict(config.to_dict()) == config


class TestSamplingEncoder:
    def test_says_nothing_before_it_is_trained(self) -> None:
        encoder = SamplingEncoder(64, 8)
        assert encoder(BASE).tolist() == [0.0] * 8
        encoder(BASE).sum().backward()
        assert encoder.outer.weight.grad is not None and encoder.outer.weight.grad.any()

    def test_features(self) -> None:
        encoder = SamplingEncoder(64, 8)
        assert encoder.features(SamplingConfig(0.7, 8, 0.9)) == pytest.approx([0, 0.7, 0.5, 0.9])
        all_tokens = [encoder.features(SamplingConfig(0.7, top_k)) for top_k in (None, 64, 100)]
        assert all_tokens == [pytest.approx([0, 0.7, 1, 1])] * 3
        assert encoder.features(SamplingConfig(0.0, 8, 0.9)) == encoder.features(SamplingConfig(0.0))


def hidden_states(
    predictor: PredictorNetwork, sampling: SamplingConfig, u: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Of context, slots and refined slots."""
    input_ids = torch.randint(32, DOCUMENT_IDS.shape, generator=torch.Generator().manual_seed(0))
    context = predictor.encode(make_batch(input_ids), sampling)
    slots = predictor.slot_hidden(context, torch.full((*WINDOW_STARTS.shape, 4), u, dtype=torch.float64))
    tokens = torch.full(slots.shape[:-1], 3)
    refined = predictor.correct(context, predictor.correction_context(context), torch.ones_like(slots), tokens)
    return context.hidden, slots, refined


class TestPredictor:
    @torch.no_grad()
    @pytest.mark.parametrize(
        "other",
        [
            SamplingConfig(0.8, 50, 0.8),
            SamplingConfig(0.7, 5, 0.8),
            SamplingConfig(0.7, 50, 1.0),
            SamplingConfig(0.0),
        ],
        ids=["temperature", "top_k", "top_p", "greedy"],
    )
    def test_settings_reach_slots_and_refiner_but_no_context(self, other: SamplingConfig) -> None:
        usual = SamplingConfig(0.7, 50, 0.8)
        predictor = tiny_predictor(sampling=usual, sampling_range=RANGE)
        of_usual, of_other = hidden_states(predictor, usual, u=0.5), hidden_states(predictor, other, u=0.5)
        base = tiny_predictor()
        with base.gate.closed():
            assert torch.equal(of_usual[0], hidden_states(base, usual)[0])
        assert torch.equal(of_usual[0], of_other[0])
        for before, after in zip(of_usual[1:], of_other[1:], strict=True):
            assert (before != after).any(-1).all()

    @torch.no_grad()
    def test_without_a_range_settings_change_nothing(self) -> None:
        predictor = tiny_predictor()
        before, after = (hidden_states(predictor, SamplingConfig(t, k)) for t, k in ((0.5, 3), (2.0, None)))
        assert all(map(torch.equal, before, after))
        assert not [name for name in predictor.trainable_state() if "sampling_encoder" in name]

    @torch.no_grad()
    def test_an_untrained_encoder_changes_nothing(self) -> None:
        predictor, plain = tiny_predictor(sampling_range=SamplingRange(top_k=(None,), top_p=(1.0,))), tiny_predictor()
        state = predictor.trainable_state()
        plain.load_trainable_state({name: state[name] for name in plain.trainable_state()})
        for name, weight in predictor.named_parameters():
            if name.endswith("sampling_encoder.outer.weight"):
                weight.zero_()
        found, expected = (hidden_states(of, SamplingConfig(0.5)) for of in (predictor, plain))
        assert all(map(torch.equal, found, expected))

    @torch.no_grad()
    def test_greedy_slots_ignore_u(self) -> None:
        predictor = tiny_predictor(sampling=SamplingConfig(0.7, 50, 0.8), sampling_range=RANGE)
        low, high = (hidden_states(predictor, SamplingConfig(0.0), u)[1] for u in (0.1, 0.9))
        assert torch.equal(low, high)
        low, high = (hidden_states(predictor, SamplingConfig(0.7), u)[1] for u in (0.1, 0.9))
        assert not torch.equal(low, high)
