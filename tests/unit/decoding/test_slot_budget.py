"""The budget that is_supported a machine: what calls cost is measured as the decoder makes them."""

import pytest

from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.slot_allocation import CorrectLengths, expected_tokens
from ptp_lightning.decoding.slot_budget import MEASURED_BUDGETS, NUM_MEASUREMENTS, CallCosts, best_budget, measure_costs
from tests.helpers.tiny_predictors import STUDENTS, tiny_predictor

LENGTHS = CorrectLengths.geometric(0.8, 7)


class TestBestBudget:
    def test_free_slots_are_all_used(self) -> None:
        found = best_budget(LENGTHS, CallCosts((1, 56), (1.0, 1.0)))
        assert expected_tokens(LENGTHS, found) == pytest.approx(expected_tokens(LENGTHS, 56))

    def test_a_slow_device_does_not_draft_too_much(self) -> None:
        assert best_budget(LENGTHS, CallCosts((1, 56), (1.0, 56.0))) == 1

    def test_between_both(self) -> None:
        costs = CallCosts((1, 56), (1.0, 4.0))
        found = best_budget(LENGTHS, costs)
        assert 1 < found < 56
        rates = [expected_tokens(LENGTHS, budget) / costs.seconds_for(budget) for budget in range(1, 57)]
        assert max(rates) == rates[found - 1]


@pytest.mark.parametrize("student", STUDENTS)
def test_every_budget_is_measured_several_times(student: str) -> None:
    times = iter(range(10**6))
    costs = measure_costs(
        tiny_predictor(student=student), GenerationSettings(window_length=8), LENGTHS, clock=lambda: float(next(times))
    )
    assert costs.budgets == (1, 8, 16, 32, 56)
    assert costs.seconds == (1.0,) * 5
    assert next(times) == 2 * 5 * NUM_MEASUREMENTS
    assert max(costs.budgets) < max(MEASURED_BUDGETS)
