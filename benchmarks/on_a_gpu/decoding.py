"""Decoding compared with `transformers.generate`, with and without CUDA graphs. Texts are compared before timing.

There are two kinds of models. The texts of models with random weights depend on all tokens that are read; they are
compared in float32. In a counting model, each token is the last token plus one, with a margin larger than any rounding
error. Its calls cost the same as those of other models of this size, and all decoders give the same text, also in
bfloat16. Its drafts are replaced by tokens that are correct with a given probability; the predictor's own drafts are
computed too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from benchmarks.on_a_gpu.branches import best_branches, break_even_acceptance_rate
from benchmarks.on_a_gpu.graph_decoder import GraphDecoder
from benchmarks.on_a_gpu.models import BenchmarkModel, counting_model, held_out_prompt, random_model
from benchmarks.on_a_gpu.rows import Figure, Record, Row, attempt
from benchmarks.training_step import clock, gemm_rate
from ptp_lightning.decoding import (
    CorrectLengths,
    Decoded,
    GenerationSettings,
    StudentDrafter,
    decode_autoregressively,
    decode_partially_quadratically,
    decode_speculatively,
)
from ptp_lightning.decoding.slot_budget import measure_best_budget
from ptp_lightning.evaluation.near_ties import first_difference, is_explained_by_rounding
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models import PredictorNetwork
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
NUM_WARM_UP = 2  # texts; transformers compiles in the first one
NUM_TIMED_CALLS = 8
MILLISECONDS_PER_SECOND = 1000
GFLOPS_PER_TFLOP = 1000
TRANSFORMERS, TRANSFORMERS_GRAPHS = "transformers.generate", "transformers.generate, static cache, graphs"
AUTOREGRESSIVE, AUTOREGRESSIVE_GRAPHS = "autoregressive", "autoregressive, graphs"
QUADRATIC, QUADRATIC_GRAPHS = "partial quadratic", "partial quadratic, graphs"
WITH_GRAPHS = (TRANSFORMERS_GRAPHS, AUTOREGRESSIVE_GRAPHS, QUADRATIC_GRAPHS)
Generate = Callable[[], tuple[list[int], int]]
"""Returns the new tokens, and the number of calls."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of texts and calls.

    Args:
        prompt_length: tokens of the prompt.
        new_tokens: tokens of the text.
        draft_length: longest draft, without its exact first token.
        slots: per call of partial quadratic decoding.
        acceptance_rate: probability that a token of a draft is correct, given that those before it are.
        repetitions: number of timed texts; the fastest one counts.
    """

    prompt_length: int
    new_tokens: int
    draft_length: int
    slots: int
    acceptance_rate: float
    repetitions: int


def exactness(record: Record, *, device: str, model: str, vocab: int, sizes: dict[str, Any]) -> None:
    """In float32, all decoders give the same text of a model with random weights."""
    size = Sizes(**sizes)
    target = random_model(torch.device(device), model, vocab, "float32", size.prompt_length)
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        settings = _settings(sampling, size)
        (reference,) = decode_autoregressively(target.predictor, [target.prompt], settings)
        for label, make in decoder_factories(target, settings, size, reference.token_ids).items():
            if sampling.temperature > 0 and label.startswith(TRANSFORMERS):
                continue  # uses other random numbers
            checked = partial(_check, make, target, settings, reference.token_ids)
            attempt(record, f"{name}: {label}", lambda checked=checked: checked()[1])


def speed(record: Record, *, device: str, model: str, vocab: int, dtype: str, sizes: dict[str, Any]) -> None:
    """Speed of all decoders, with a counting model of this size and a given acceptance rate of drafts."""
    size = Sizes(**sizes)
    torch_device = torch.device(device)
    attempt(record, "square GEMM", partial(_gemm_rate, torch_device, dtype))
    target = counting_model(torch_device, model, vocab, dtype, size.prompt_length)
    settings = _settings(GREEDY, size)
    (reference,) = decode_autoregressively(target.predictor, [target.prompt], settings)
    call = f"call of {1 + size.draft_length} tokens and {size.slots} slots, graphs"
    attempt(record, call, partial(call_costs, target, settings, size))
    factories = decoder_factories(target, settings, size, reference.token_ids)
    _compare(record, factories, target, settings, size, reference, dtype)


def shipped(record: Record, *, device: str, sizes: dict[str, Any]) -> None:
    """Speed of the shipped adapter with its own drafts, without graphs, because it has a refiner."""
    size = Sizes(**sizes)
    attempt(record, "square GEMM", partial(_gemm_rate, torch.device(device), "float32"))
    predictor = load_network().to(device)
    base_model = load_backbone(predictor.config.backbone).to(device).eval()  # pyright: ignore[reportArgumentType]
    target = BenchmarkModel(predictor, base_model, held_out_prompt(predictor, size.prompt_length))
    settings = GenerationSettings(GREEDY, size.new_tokens, window_length=predictor.config.window_length)
    lengths, _, budget = measure_best_budget(predictor, settings)
    settings = GenerationSettings(GREEDY, size.new_tokens, window_length=settings.window_length, slot_budget=budget)
    (reference,) = decode_autoregressively(predictor, [target.prompt], settings)
    ours = {
        f"{QUADRATIC}, {budget} slots": partial(decode_partially_quadratically, lengths=lengths),
        "speculative": decode_speculatively,
    }
    factories = {
        TRANSFORMERS: partial(transformers_generate, target, settings),
        AUTOREGRESSIVE_GRAPHS: partial(graph_decoder, target, settings),
        AUTOREGRESSIVE: _package_decoder(decode_autoregressively, target, settings),
        **{label: _package_decoder(decode, target, settings) for label, decode in ours.items()},
        TRANSFORMERS_GRAPHS: partial(transformers_with_graphs, target, settings),
    }
    _compare(record, factories, target, settings, size, reference, "float32")


def decoder_factories(
    model: BenchmarkModel, settings: GenerationSettings, size: Sizes, reference: Sequence[int]
) -> dict[str, Callable[[], Generate]]:
    """Factories of all decoders, by name. Errors of a decoder are raised when its factory is called."""
    predictor = model.predictor
    draft = forced_draft(reference, size.acceptance_rate, predictor)
    lengths = CorrectLengths.geometric(size.acceptance_rate, size.draft_length)
    branches = best_branches(size.draft_length, size.slots, size.acceptance_rate)
    drafter = ForcedDrafter(StudentDrafter(predictor.config.objective, predictor.sampler(settings.sampling)), draft)
    quadratic = partial(decode_partially_quadratically, drafter=drafter, lengths=lengths)
    return {
        TRANSFORMERS: partial(transformers_generate, model, settings),
        AUTOREGRESSIVE_GRAPHS: partial(graph_decoder, model, settings),
        AUTOREGRESSIVE: _package_decoder(decode_autoregressively, model, settings),
        "speculative": _package_decoder(partial(decode_speculatively, drafter=drafter), model, settings),
        QUADRATIC: _package_decoder(quadratic, model, settings),
        QUADRATIC_GRAPHS: partial(graph_decoder, model, settings, branches, draft),
        TRANSFORMERS_GRAPHS: partial(transformers_with_graphs, model, settings),
    }


def transformers_generate(model: BenchmarkModel, settings: GenerationSettings, **options: Any) -> Generate:
    """Greedy `transformers.generate`.

    Unlike in evaluations, calls are not counted by a hook, because a hook would trigger another compilation.
    """
    base_model, prompt = model.base_model, model.prompt
    input_ids = torch.tensor([prompt], device=base_model.device)

    def generate() -> tuple[list[int], int]:
        output = base_model.generate(  # pyright: ignore[reportCallIssue]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        token_ids = output[0, len(prompt) :].tolist()
        return token_ids, len(token_ids)

    return generate


def transformers_with_graphs(model: BenchmarkModel, settings: GenerationSettings) -> Generate:
    """The same with a static cache and, on a GPU, a model compiled with CUDA graphs."""
    compiled = (
        {"compile_config": CompileConfig(mode="reduce-overhead")} if model.base_model.device.type == "cuda" else {}
    )
    return transformers_generate(model, settings, cache_implementation="static", **compiled)


def graph_decoder(
    model: BenchmarkModel, settings: GenerationSettings, branches: Sequence[int] = (), draft: Tensor | None = None
) -> Generate:
    """See `GraphDecoder`."""
    decoder = GraphDecoder(model.predictor, settings, len(model.prompt), branches, draft)
    return lambda: decoder.decode(model.prompt)


def call_costs(model: BenchmarkModel, settings: GenerationSettings, size: Sizes) -> dict[str, Figure]:
    """Cost of a call of `GraphDecoder` in autoregressive steps, and the break-even acceptance rate."""
    predictor, prompt = model.predictor, model.prompt
    branches = best_branches(size.draft_length, size.slots, size.acceptance_rate)
    wait = partial(clock, predictor.base_model.device)
    step, call = (
        min(
            decoder.call_seconds(prompt, min(NUM_TIMED_CALLS, size.new_tokens // (1 + size.draft_length)), wait)
            for _ in range(1 + size.repetitions)
        )
        for decoder in (GraphDecoder(predictor, settings, len(prompt), shape) for shape in ((), branches))
    )
    return {
        "step_ms": MILLISECONDS_PER_SECOND * step,
        "ms_per_call": MILLISECONDS_PER_SECOND * call,
        "steps": call / step,
        "break_even_acceptance_rate": break_even_acceptance_rate(branches, call / step),
    }


@dataclass(frozen=True)
class ForcedDrafter:
    """Runs the predictor's drafter, and returns given tokens.

    Args:
        own: drafter of the predictor.
        tokens: `[M]`, draft token for each position of the text.
    """

    own: StudentDrafter
    tokens: Tensor

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        """See `Drafter`."""
        self.own(slot_logits, auxiliaries, starts)
        offsets = torch.arange(auxiliaries.shape[1], device=self.tokens.device)
        positions = torch.tensor(starts, device=self.tokens.device).unsqueeze(1) + offsets
        return self.tokens[positions.clamp_max(len(self.tokens) - 1)]


def forced_draft(reference: Sequence[int], acceptance_rate: float, predictor: PredictorNetwork) -> Tensor:
    """The tokens of a text, each correct with probability `acceptance_rate`."""
    tokens = torch.tensor(reference)
    is_correct = torch.rand(len(tokens), generator=torch.Generator().manual_seed(7)) < acceptance_rate
    other = (tokens + 1) % predictor.base_model.config.vocab_size
    return torch.where(is_correct, tokens, other).to(predictor.base_model.device)


def _settings(sampling: SamplingConfig, size: Sizes) -> GenerationSettings:
    return GenerationSettings(sampling, size.new_tokens, window_length=1 + size.draft_length, slot_budget=size.slots)


def _package_decoder(
    decode: Callable[..., list[Decoded]], model: BenchmarkModel, settings: GenerationSettings
) -> Callable[[], Generate]:
    def generate() -> tuple[list[int], int]:
        (decoded,) = decode(model.predictor, [model.prompt], settings)
        return decoded.token_ids, decoded.num_calls

    return lambda: generate


def _has_graphs(label: str, device: torch.device) -> str:
    """Whether CUDA graphs were replayed; torch may skip them for a compiled model."""
    if device.type != "cuda" or label not in WITH_GRAPHS:
        return "no"
    if label != TRANSFORMERS_GRAPHS:
        return "yes"
    try:
        from torch._inductor.cudagraph_trees import get_manager

        manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
        return "yes" if manager is not None and manager.roots else "no, torch made none"
    except (ImportError, AttributeError):  # of another version of torch
        return "unknown"


def _compare(
    record: Record,
    factories: Mapping[str, Callable[[], Generate]],
    model: BenchmarkModel,
    settings: GenerationSettings,
    size: Sizes,
    reference: Decoded,
    dtype: str,
) -> None:
    """Check and time all decoders; speeds are also given relative to the baselines.

    Transformers with graphs comes last, because it compiles for a long time and may exceed the time limit.
    """
    rates: dict[str, float] = {}
    for label, make in factories.items():

        def measure(label: str = label, make: Callable[[], Generate] = make) -> dict[str, Figure]:
            generate, agreement = _check(make, model, settings, reference.token_ids)
            seconds, num_calls = _fastest(generate, model.base_model.device, size.repetitions)
            rates[label] = len(reference.token_ids) / seconds
            return {
                "dtype": dtype,
                "tokens_per_s": rates[label],
                "ms_per_call": MILLISECONDS_PER_SECOND * seconds / num_calls,
                "tokens_per_call": len(reference.token_ids) / num_calls,
                "x_transformers": _relative(rates, label, TRANSFORMERS),
                "x_autoregressive_graphs": _relative(rates, label, AUTOREGRESSIVE_GRAPHS),
                "graphs": _has_graphs(label, model.base_model.device),
                **agreement,
            }

        attempt(record, label, measure)
    if TRANSFORMERS_GRAPHS in rates:
        baseline = rates.pop(TRANSFORMERS_GRAPHS)
        record(Row(f"relative to {TRANSFORMERS_GRAPHS}", {label: rate / baseline for label, rate in rates.items()}))


def _check(
    make: Callable[[], Generate], model: BenchmarkModel, settings: GenerationSettings, reference: Sequence[int]
) -> tuple[Generate, dict[str, Figure]]:
    """A decoder, after its warm-up texts were compared with the reference.

    Raises:
        ValueError: a text differs by more than rounding explains.
    """
    generate = make()
    same = len(reference)
    for _ in range(NUM_WARM_UP):
        found, _ = generate()
        position = first_difference(found, reference)
        if position is None:
            continue
        if position >= min(len(found), len(reference)) or not is_explained_by_rounding(
            model.predictor, model.prompt, reference, position, found[position], settings
        ):
            raise ValueError(
                f"expected the text of autoregressive decoding, found a difference from token {position} on"
            )
        same = min(same, position)
    return generate, {"same_tokens": f"{same} of {len(reference)}"}


def _fastest(generate: Generate, device: torch.device, repetitions: int) -> tuple[float, int]:
    """Seconds and calls of the fastest text."""
    measured = []
    for _ in range(repetitions):
        begin = _now(device)
        _, num_calls = generate()
        measured.append((_now(device) - begin, num_calls))
    return min(measured)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _relative(rates: Mapping[str, float], label: str, other: str) -> float | None:
    return rates[label] / rates[other] if other in rates else None


def _gemm_rate(device: torch.device, dtype: str) -> dict[str, Figure]:
    return {"dtype": dtype, "tflops": gemm_rate(device, getattr(torch, dtype)) / GFLOPS_PER_TFLOP}
