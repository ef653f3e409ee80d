"""Cost of a call of partial quadratic decoding, in steps of one-token decoding of the same model.

    python -m benchmarks.decoding_calls [--budgets 16 64] [--context 256] [--draft 3]
    python -m benchmarks.decoding_calls --model smollm2 --dtype bfloat16 --threads 2 --budgets 0 16 32

The minimum of many repetitions, which take turns, so that changes of the machine's speed affect all. A call reads the
last token, a draft and the slots, picks tokens, and makes the next draft. A budget of 0 is a cycle of speculative
decoding with a single draft: the call that drafts a window and the call that verifies it. `--prompts` measures the
reading of prompts, `--trees` that of drafted tokens: one draft, and trees of several.

By default the model is a Llama with random weights, and so is the adapter; costs do not depend on them. `--model` names
another model, and `--adapter` a trained predictor, with its correction and its draft vocabulary. Then the model is
measured in transformers too, without any of our changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding import CorrectLengths, GenerationSettings, StudentDrafter
from ptp_lightning.decoding.drafting import draft_windows
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.partial_quadratic import require_slots_in_calls
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.slot_allocation import allocate_slots
from ptp_lightning.decoding.state import BatchContext
from ptp_lightning.decoding.token_tree import TokenTree
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.sampling import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
NUM_REPETITIONS = 10
NUM_CONSECUTIVE = 4
NUM_GENERATED = 7
TREES = {  # the token before each, see `TokenTree`
    "8 drafted tokens": [0, 0, 1, 2, 3, 4, 5, 6],
    "8 drafted tokens, 4 paths": [0, 0, 0, 1, 1, 3, 3, 2],
    "12 drafted tokens, 7 paths": [0, 0, 0, 0, 1, 1, 2, 2, 4, 4, 5, 6],
}
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or id of a model, or smollm2; by default random weights")
    parser.add_argument("--adapter", help="folder or name of a predictor instead, smollm2 for instance")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="numbers of tokens of prompts")
    parser.add_argument("--trees", action="store_true", help="measure the reading of trees of drafts")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--draft", type=int, default=3, help="draft tokens verified by a call")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="layers that carry the adapter")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=NUM_REPETITIONS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    predictor = _predictor(options)
    require_slots_in_calls(predictor)
    sampling = predictor.config.sampling
    timed: dict[str, Callable[[], float]] = {}
    if options.model is not None or options.adapter is not None:
        base_model = load_backbone(predictor.config.backbone)
        timed["transformers.generate, a step"] = partial(generate_step, base_model, options.context)
        for length in options.prompts:
            timed[f"prompt of {length}, transformers"] = partial(transformers_prompt, base_model, length)
    for length in options.prompts:
        timed[f"prompt of {length}, own"] = partial(own_prompt, predictor, length)
    timed["own loop, a step"] = Call(predictor, sampling, options, None).seconds
    for budget in options.budgets:
        name = f"call of {budget} slots" if budget else "speculative cycle, two calls"
        timed[name] = Call(predictor, sampling, options, budget).seconds
    for name, parents in TREES.items() if options.trees else ():
        timed[name] = partial(tree_call, context_of(predictor, sampling, options.context), parents)
    fastest = dict.fromkeys(timed, float("inf"))
    with prepare_for_decoding(predictor):
        for _ in range(options.repetitions):
            for name, seconds in timed.items():
                for _ in range(NUM_CONSECUTIVE):  # as in decoding, with weights still in the cache
                    fastest[name] = min(fastest[name], seconds())
    print(f"{options.dtype}, {options.threads} threads, {options.draft} draft tokens, context of {options.context}")
    print(f"{gemm_rate():.0f} GFLOP/s in a 1024^3 float32 GEMM")
    steps = [name for name in timed if name.endswith("a step")]
    print(f"{'':32}{'ms':>8}" + "".join(f"  in steps of {name.removesuffix(', a step')}" for name in steps))
    for name, seconds in fastest.items():
        ratios = "".join(f"{seconds / fastest[step]:{len(step) + 7}.2f}" for step in steps)
        print(f"{name:32}{1000 * seconds:8.1f}{ratios}")


def _predictor(options: argparse.Namespace) -> PredictorNetwork:
    if options.adapter is not None:
        return load_network(options.adapter, dtype=options.dtype).eval()
    model = {"from_config": MODEL} if options.model is None else {"path": options.model}
    config = PredictorConfig(
        BackboneSettings(dtype=options.dtype, **model),
        window_length=WINDOW_LENGTH,
        lora=LoraSettings(rank=options.rank, target_modules=options.targets),
        sampling=SamplingConfig(temperature=0.7, top_k=50, top_p=0.9),
    )
    return PredictorNetwork(config).eval()


@torch.inference_mode()
def generate_step(model: PreTrainedModel, num_context: int) -> float:
    """Seconds of a token of an unchanged model in `transformers.generate`, the least of several."""
    times: list[float] = []

    def note_time(input_ids: Tensor, scores: Tensor) -> Tensor:
        times.append(perf_counter())
        return scores

    prompt = torch.ones(1, num_context, dtype=torch.long)
    length = {"min_new_tokens": NUM_GENERATED, "max_new_tokens": NUM_GENERATED}
    model.generate(prompt, do_sample=False, logits_processor=[note_time], **length)  # pyright: ignore[reportCallIssue]
    return min(after - before for before, after in pairwise(times))


@torch.inference_mode()
def transformers_prompt(model: PreTrainedModel, length: int) -> float:
    """Seconds in which an unchanged model reads a prompt."""
    prompt = torch.ones(1, length, dtype=torch.long)
    begin = perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return perf_counter() - begin


@torch.inference_mode()
def own_prompt(predictor: PredictorNetwork, length: int) -> float:
    """Seconds in which a context reads a prompt up to its last token."""
    context = BatchContext(predictor, GenerationSettings(), [length])
    begin = perf_counter()
    context.prefill([[1] * length])
    return perf_counter() - begin


def context_of(
    predictor: PredictorNetwork, sampling: SamplingConfig, length: int, slot_budget: int = 1
) -> BatchContext:
    """A text that has been read."""
    settings = GenerationSettings(sampling, 64, window_length=predictor.config.window_length, slot_budget=slot_budget)
    with torch.inference_mode():
        context = BatchContext(predictor, settings, [length])
        context.read(torch.zeros(1, length, dtype=torch.long))
        context.keep([length])
    return context


@torch.inference_mode()
def tree_call(context: BatchContext, parents: list[int]) -> float:
    """Seconds in which drafted tokens are read, without the picks after them; the context stays as it is."""
    is_chain = parents == [max(0, column - 1) for column in range(len(parents))]
    tree = TokenTree(torch.zeros(1, len(parents), dtype=torch.long), torch.tensor([parents]), is_chain)
    begin = perf_counter()
    context.read_tree(tree)
    context.keep([0])
    return perf_counter() - begin


class Call:
    """A repeatable call after a context, or a cycle of two; without a budget, a step of autoregressive decoding."""

    def __init__(
        self,
        predictor: PredictorNetwork,
        sampling: SamplingConfig,
        options: argparse.Namespace,
        budget: int | None,
    ) -> None:
        length = predictor.config.window_length
        self.predictor = predictor
        self.num_drafted = min(options.draft, length - 1) if budget else 0
        self.is_cycle = budget == 0
        lengths = CorrectLengths.geometric(ACCEPTANCE_RATE, length - 1)
        if budget is None:
            self.slots = [0]
        else:
            self.slots = list(allocate_slots(lengths, self.num_drafted, budget)) if budget else [length - 1]
        self.context = context_of(predictor, sampling, options.context, budget or 1)
        self.drafter = StudentDrafter(predictor.config.objective, self.context.sampling)

    @torch.inference_mode()
    def seconds(self) -> float:
        """Seconds of a call, which leaves the context unchanged."""
        context = self.context
        begin = perf_counter()
        tokens = torch.zeros(1, 1 + self.num_drafted, dtype=torch.long)
        hidden, slots = context.read(tokens, Lookahead.branches([1], [self.slots], context.device))
        picks = self._picks(hidden)
        picks.tolist()
        context.keep([0])
        if self.slots[-1]:
            draft = draft_windows(context, self.drafter, picks[:, :1], slots[:, : self.slots[-1]], [0])
            draft.tolist()
            if self.is_cycle:
                hidden, _ = context.read(draft)
                self._picks(hidden).tolist()
                context.keep([0])
        return perf_counter() - begin

    def _picks(self, hidden: Tensor) -> Tensor:
        context = self.context
        return pick(context.auxiliaries([0], hidden.shape[1]), context.sampling.distribution(context.logits(hidden)))


def gemm_rate() -> float:
    """GFLOP/s of a square matrix product in this process."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    fastest = float("inf")
    for _ in range(10):
        begin = perf_counter()
        torch.matmul(a, b)
        fastest = min(fastest, perf_counter() - begin)
    return 2 * 1024**3 / fastest / 1e9


if __name__ == "__main__":
    main()
