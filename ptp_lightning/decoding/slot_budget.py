"""The slot budget of partial quadratic decoding with the most expected tokens per second on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.drafting import StudentDrafter, draft_windows
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.slot_allocation import (
    CorrectLengths,
    allocate_slots,
    draft_length_distribution,
    expected_tokens,
)
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.models.network import PredictorNetwork

MEASURED_BUDGETS = (1, 8, 16, 32, 64, 128)
NUM_MEASUREMENTS = 5
NUM_CONTEXT_TOKENS = 64


@dataclass(frozen=True)
class CallCosts:
    """Time of a call of partial quadratic decoding, by its number of slots.

    Args:
        budgets: ascending numbers of slots.
        seconds: of a call with each.

    >>> CallCosts((1, 9), (0.001, 0.002)).seconds_for(5)
    0.0015
    """

    budgets: tuple[int, ...]
    seconds: tuple[float, ...]

    def seconds_for(self, budget: int) -> float:
        """Seconds of a call, interpolated linearly between measurements."""
        return float(np.interp(budget, self.budgets, self.seconds))


class BudgetChoice(NamedTuple):
    """The best budget, and the distribution of correct tokens and the cost of calls for which it is the best."""

    lengths: CorrectLengths
    costs: CallCosts
    budget: int


def best_budget(lengths: CorrectLengths, costs: CallCosts) -> int:
    """The number of slots, up to the largest that was measured, with the most expected tokens per second."""

    def tokens_per_second(budget: int) -> float:
        return expected_tokens(lengths, budget) / costs.seconds_for(budget)

    return max(range(1, costs.budgets[-1] + 1), key=tokens_per_second)


def measure_best_budget(predictor: PredictorNetwork, settings: GenerationSettings) -> BudgetChoice:
    """The best budget for a predictor on this machine, from its validation and from calls that are measured now."""
    lengths = CorrectLengths.from_validation(predictor.prefix_counts, settings.window_length - 1)
    costs = measure_costs(predictor, settings, lengths)
    return BudgetChoice(lengths, costs, best_budget(lengths, costs))


@torch.inference_mode()
def measure_costs(
    predictor: PredictorNetwork,
    settings: GenerationSettings,
    lengths: CorrectLengths,
    clock: Callable[[], float] = perf_counter,
) -> CallCosts:
    """Measure calls with several numbers of slots; each reads, picks, corrects and drafts as the decoder does.

    Args:
        predictor: the network.
        settings: of the texts.
        lengths: decides how slots are divided, and with that the usual length of a draft.
        clock: returns seconds.
    """
    shares = {budget: draft_length_distribution(lengths, budget) for budget in _budgets_to_measure(lengths)}
    usual_length = {budget: round(float(share @ np.arange(len(share)))) for budget, share in shares.items()}
    fastest = dict.fromkeys(usual_length, float("inf"))
    with prepare_for_decoding(predictor):
        context = BatchContext(predictor, replace(settings, seed=0, slot_budget=max(fastest)), [NUM_CONTEXT_TOKENS])
        device = context.device
        context.read(torch.zeros(1, NUM_CONTEXT_TOKENS, dtype=torch.long, device=device))
        context.keep([NUM_CONTEXT_TOKENS])
        drafter = StudentDrafter(predictor.config.objective, context.sampling)
        for _ in range(NUM_MEASUREMENTS):
            for budget, length in usual_length.items():
                begin = clock()
                slots = [allocate_slots(lengths, length, budget)]
                tokens = torch.zeros(1, 1 + length, dtype=torch.long, device=device)
                _, ahead = context.read(tokens, Lookahead.branches([1], slots, device))
                distribution = context.sampling.distribution(context.next_logits([0], 1 + length))
                picks = pick(context.auxiliaries([0], 1 + length), distribution)
                picks.tolist()  # waits for the device, as the decoder does
                context.keep([0])
                draft_windows(context, drafter, picks[:, :1], ahead[:, : max(1, length)], [0]).tolist()
                fastest[budget] = min(fastest[budget], clock() - begin)
    return CallCosts(tuple(fastest), tuple(np.maximum.accumulate(list(fastest.values())).tolist()))


def _budgets_to_measure(lengths: CorrectLengths) -> Sequence[int]:
    """Budgets that the branches can hold; at least one."""
    longest = len(lengths.survival)
    most = longest * (longest + 1)
    return [budget for budget in MEASURED_BUDGETS if budget < most] + [min(most, MEASURED_BUDGETS[-1])]
