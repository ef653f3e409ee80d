"""How many slots a call should have on this machine: the budget with which most tokens per second are expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.drafting import StudentDrafter, draft_windows
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.slot_allocation import CorrectLengths, allocate, expected_tokens, length_shares
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.models.network import PredictorNetwork

MEASURED_BUDGETS = (1, 8, 16, 32, 64, 128)
NUM_MEASUREMENTS = 5
NUM_CONTEXT_TOKENS = 64


@dataclass(frozen=True)
class CallCosts:
    """What a call of partial quadratic decoding takes, by its number of slots.

    Args:
        budgets: rising numbers of slots.
        seconds: of a call with as many.
    """

    budgets: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, budget: int) -> float:
        """Seconds of a call, by straight lines between what was measured."""
        return float(np.interp(budget, self.budgets, self.seconds))


def best_budget(lengths: CorrectLengths, costs: CallCosts) -> int:
    """The number of slots, up to the most that was measured, with most expected tokens per second."""
    return max(range(1, costs.budgets[-1] + 1), key=lambda budget: expected_tokens(lengths, budget) / costs.of(budget))


def measured_budget(predictor: PredictorNetwork, settings: GenerationSettings) -> tuple[CorrectLengths, CallCosts, int]:
    """How long drafts are right as far as validation says, what calls cost here, and the best budget for both."""
    lengths = CorrectLengths.of_validation(predictor.prefix_counts, settings.window_length - 1)
    costs = measure_costs(predictor, settings, lengths)
    return lengths, costs, best_budget(lengths, costs)


@torch.inference_mode()
def measure_costs(
    predictor: PredictorNetwork,
    settings: GenerationSettings,
    lengths: CorrectLengths,
    clock: Callable[[], float] = perf_counter,
) -> CallCosts:
    """Time calls with several numbers of slots, each as the decoder makes it: read, pick, refine, propose.

    Args:
        predictor: in eval mode.
        settings: of the texts.
        lengths: decides how slots are divided, and so how many a draft has.
        clock: gives seconds.
    """
    shares = {budget: length_shares(lengths, budget) for budget in _measurable(lengths)}
    usual_length = {budget: round(float(share @ np.arange(len(share)))) for budget, share in shares.items()}
    fastest = dict.fromkeys(usual_length, float("inf"))
    context = BatchContext(predictor, replace(settings, seed=0, slot_budget=max(fastest)), [NUM_CONTEXT_TOKENS])
    device = context.device
    context.read(torch.zeros(1, NUM_CONTEXT_TOKENS, dtype=torch.long, device=device))
    context.keep([NUM_CONTEXT_TOKENS])
    drafter = StudentDrafter(predictor.config.objective, context.sampling)
    for _ in range(NUM_MEASUREMENTS):
        for budget, length in usual_length.items():
            begin = clock()
            slots = [allocate(lengths, length, budget)]
            tokens = torch.zeros(1, 1 + length, dtype=torch.long, device=device)
            hidden, ahead = context.read(tokens, Lookahead.branches([1], slots, device))
            distribution = context.sampling.distribution(context.logits(hidden))
            picks = pick(context.auxiliaries([0], 1 + length), distribution)
            picks.tolist()  # waits for the device, as the decoder does
            context.keep([0])
            draft_windows(context, drafter, picks[:, :1], ahead[:, : max(1, length)], [0]).tolist()
            fastest[budget] = min(fastest[budget], clock() - begin)
    return CallCosts(tuple(fastest), tuple(np.maximum.accumulate(list(fastest.values())).tolist()))


def _measurable(lengths: CorrectLengths) -> Sequence[int]:
    """Budgets that the branches can hold, at least one."""
    longest = len(lengths.survival)
    most = longest * (longest + 1)
    return [budget for budget in MEASURED_BUDGETS if budget < most] + [min(most, MEASURED_BUDGETS[-1])]
