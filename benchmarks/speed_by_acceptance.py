"""Speed of partial quadratic decoding for simulated acceptance rates.

    python -m benchmarks.speed_by_acceptance [--acceptance_rates 0.6 0.7 0.8 0.9 1.0] [--windows 4 8 16]

The shipped adapter runs completely; then its draft is replaced by one whose tokens are correct with a given probability
each (the acceptance rate). The number and allocation of slots are chosen for that rate. CPU time of one thread,
relative to autoregressive decoding of the same texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from time import thread_time

import torch
from torch import Tensor

from ptp_lightning.data import StandardLibrary
from ptp_lightning.decoding import (
    CorrectLengths,
    GenerationSettings,
    StudentDrafter,
    decode_autoregressively,
    decode_partially_quadratically,
)
from ptp_lightning.decoding.slot_budget import best_budget, measure_costs
from ptp_lightning.decoding.text import tokenizer_of
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models.network import PredictorNetwork
from tests.helpers.tiny_decoding import ForcedDraft

NUM_TEXTS = 4
PROMPT_TOKENS = 128
NEW_TOKENS = 64
NUM_REPETITIONS = 3


class ReplacedDraft:
    """Runs the predictor's drafter, and returns another draft.

    Args:
        own: drafter of the predictor.
        forced: returns the draft.
    """

    def __init__(self, own: StudentDrafter, forced: ForcedDraft) -> None:
        self.own = own
        self.forced = forced

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        """See `Drafter`."""
        self.own(slot_logits, auxiliaries, starts)
        return self.forced(slot_logits, auxiliaries, starts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acceptance_rates", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    predictor = load_network()
    prompts = held_out_prompts(predictor)
    for window in options.windows:
        for rate in options.acceptance_rates:
            slots, tokens_per_call, speed = measure(predictor, prompts, window, rate)
            print(f"window {window:>2}  acceptance rate {rate:.2f}  slots {slots:>3}  ", end="")
            print(f"{tokens_per_call:5.2f} tokens per call  x {speed:.2f}")


def held_out_prompts(predictor: PredictorNetwork) -> list[list[int]]:
    """First tokens of held-out files."""
    tokenizer = tokenizer_of(predictor)
    documents = (tokenizer.encode(document.text) for document in StandardLibrary().documents("val"))
    long_enough = [token_ids[:PROMPT_TOKENS] for token_ids in documents if len(token_ids) > PROMPT_TOKENS]
    return long_enough[:NUM_TEXTS]


def measure(
    predictor: PredictorNetwork, prompts: list[list[int]], window: int, acceptance_rate: float
) -> tuple[int, float, float]:
    """Slots per call, tokens committed per call, and speed relative to autoregressive decoding."""
    sampling = predictor.config.sampling
    settings = GenerationSettings(sampling, NEW_TOKENS, window_length=window)
    lengths = CorrectLengths.geometric(acceptance_rate, window - 1)
    slots = best_budget(lengths, measure_costs(predictor, settings, lengths, clock=thread_time))
    settings = GenerationSettings(sampling, NEW_TOKENS, window_length=window, slot_budget=slots)
    own = StudentDrafter(predictor.config.objective, predictor.sampler())
    fastest = [[float("inf")] * 2 for _ in prompts]
    num_calls = num_tokens = 0
    for _ in range(NUM_REPETITIONS):
        for row, prompt in enumerate(prompts):
            begin = thread_time()
            (reference,) = decode_autoregressively(predictor, [prompt], settings)
            middle = thread_time()
            forced = ForcedDraft([reference.token_ids], acceptance_rate, predictor.base_model.config.vocab_size)
            drafter = ReplacedDraft(own, forced)
            (decoded,) = decode_partially_quadratically(predictor, [prompt], settings, drafter=drafter, lengths=lengths)
            end = thread_time()
            assert decoded.token_ids == reference.token_ids
            fastest[row] = [
                min(old, new) for old, new in zip(fastest[row], (middle - begin, end - middle), strict=True)
            ]
            num_calls, num_tokens = num_calls + decoded.num_calls, num_tokens + len(decoded.token_ids)
    step, call = (sum(column) for column in zip(*fastest, strict=True))
    return slots, num_tokens / num_calls, step / call


if __name__ == "__main__":
    main()
