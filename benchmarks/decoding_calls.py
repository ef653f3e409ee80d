"""Cost of a call of partial quadratic decoding, in steps of autoregressive decoding of the same model.

    python -m benchmarks.decoding_calls [--budgets 16 64] [--context 256] [--draft 3]

CPU time of one thread, the minimum of many repetitions. The model is a Llama with random weights and LoRA on all linear
layers. A call reads the last token, a draft and the slots, picks tokens, and makes the next draft.
"""

from __future__ import annotations

import argparse
from time import thread_time

import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding import CorrectLengths, GenerationSettings, StudentDrafter
from ptp_lightning.decoding.drafting import draft_windows
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.slot_allocation import allocate_slots
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.sampling import SamplingConfig

MODEL = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
WINDOW_LENGTH = 16
ACCEPTANCE_RATE = 0.7  # assumed when slots are allocated
NUM_REPETITIONS = 40
NUM_CONSECUTIVE = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--draft", type=int, default=3, help="draft tokens verified by a call")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sampling = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
    config = PredictorConfig(
        BackboneSettings(from_config=MODEL, dtype=options.dtype),
        window_length=WINDOW_LENGTH,
        lora=LoraSettings(rank=options.rank),
        sampling=sampling,
    )
    predictor = PredictorNetwork(config).eval()
    calls = {budget: Call(predictor, sampling, options, budget) for budget in (None, *options.budgets)}
    fastest = dict.fromkeys(calls, float("inf"))
    with prepare_for_decoding(predictor):
        for _ in range(NUM_REPETITIONS):
            for budget, call in calls.items():  # in turn, so that changes of the machine's speed affect all
                for _ in range(NUM_CONSECUTIVE):  # as in decoding, with weights still in the cache
                    fastest[budget] = min(fastest[budget], call.seconds())
    step = fastest[None]
    print(f"autoregressive step: {1000 * step:.2f} ms; {gemm_rate():.0f} GFLOP/s in a 1024^3 float32 GEMM")
    for budget in options.budgets:
        print(f"{budget} slots, {options.draft} draft tokens: {1000 * fastest[budget]:.2f} ms, ", end="")
        print(f"{fastest[budget] / step:.2f} steps")


class Call:
    """A repeatable call after a context; without a budget, a step of autoregressive decoding."""

    def __init__(
        self,
        predictor: PredictorNetwork,
        sampling: SamplingConfig,
        options: argparse.Namespace,
        budget: int | None,
    ) -> None:
        settings = GenerationSettings(sampling, 64, window_length=WINDOW_LENGTH, slot_budget=budget or 1)
        self.predictor = predictor
        self.budget = budget
        self.num_drafted = options.draft if budget else 0
        self.tokens = torch.zeros(1, 1 + self.num_drafted, dtype=torch.long)
        self.lengths = CorrectLengths.geometric(ACCEPTANCE_RATE, WINDOW_LENGTH - 1)
        with torch.inference_mode():
            self.context = BatchContext(predictor, settings, [options.context])
            self.context.read(torch.zeros(1, options.context, dtype=torch.long))
            self.context.keep([options.context])
        self.drafter = StudentDrafter(predictor.config.objective, self.context.sampling)

    @torch.inference_mode()
    def seconds(self) -> float:
        """CPU seconds of a call, which leaves the context unchanged."""
        context, budget, slots = self.context, self.budget, None
        begin = thread_time()
        if budget is not None:
            slots = [list(allocate_slots(self.lengths, self.num_drafted, budget))]
        lookahead = None if slots is None else Lookahead.branches([1], slots, context.device)
        hidden, ahead = context.read(self.tokens, lookahead)
        distribution = context.sampling.distribution(self.predictor.logits(hidden))
        picks = pick(context.auxiliaries([0], self.tokens.shape[1]), distribution)
        picks.tolist()
        context.keep([0])
        if slots is not None:
            draft_windows(context, self.drafter, picks[:, :1], ahead[:, : slots[0][-1]], [0]).tolist()
        return thread_time() - begin


def gemm_rate() -> float:
    """GFLOP/s of a square matrix product in this process."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    fastest = float("inf")
    for _ in range(10):
        begin = thread_time()
        a @ b
        fastest = min(fastest, thread_time() - begin)
    return 2 * 1024**3 / fastest / 1e9


if __name__ == "__main__":
    main()
