"""Decoding against `transformers.generate`, with CUDA graphs and without. Texts are compared before they are timed.

Two kinds of random weights: plain ones, whose texts depend on everything that is read, for comparing in float32; and
a model that counts, whose every token follows from the one before it, by margins that no rounding bridges. Its calls
take what any model's of this size take, and all who write, write the same text, in bfloat16 too. Its drafts are right
with a given probability; what the predictor itself proposes is computed and thrown away.
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

from benchmarks.on_a_gpu.branches import best_branches, break_even
from benchmarks.on_a_gpu.captured import CapturedDecoder
from benchmarks.on_a_gpu.rows import Figure, Record, Row, attempt
from benchmarks.on_a_gpu.subjects import Subject, counting_subject, held_out_prompt, random_subject
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
from ptp_lightning.decoding.slot_budget import measured_budget
from ptp_lightning.evaluation.near_ties import first_difference, is_explained_by_rounding
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models import PredictorNetwork
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
NUM_WARM_UP = 2  # texts: in the first transformers compiles
NUM_TIMED_CALLS = 8
MILLISECONDS_PER_SECOND = 1000
GFLOPS_PER_TFLOP = 1000
LIBRARY, LIBRARY_GRAPHS = "transformers.generate", "transformers.generate, static cache, graphs"
ONE_TOKEN, ONE_TOKEN_GRAPHS = "one token a call", "one token a call, graphs"
QUADRATIC, QUADRATIC_GRAPHS = "partial quadratic", "partial quadratic, graphs"
WITH_GRAPHS = (LIBRARY_GRAPHS, ONE_TOKEN_GRAPHS, QUADRATIC_GRAPHS)
Write = Callable[[], tuple[list[int], int]]
"""Gives the new tokens, and how many calls they took."""


@dataclass(frozen=True)
class Sizes:
    """Of texts and calls.

    Args:
        prompt: tokens.
        new: tokens.
        drafted: most tokens of a draft, its exact first one not counted.
        slots: of a call of partial quadratic decoding.
        right: probability that a token of a draft is right, if those before it are.
        repetitions: texts that are timed, of which the fastest counts.
    """

    prompt: int
    new: int
    drafted: int
    slots: int
    right: float
    repetitions: int


def exactness(record: Record, *, device: str, model: str, vocab: int, sizes: dict[str, Any]) -> None:
    """In float32, with weights that make a text depend on all that is read: everyone writes the same."""
    size = Sizes(**sizes)
    subject = random_subject(torch.device(device), model, vocab, "float32", size.prompt)
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        settings = _settings(sampling, size)
        (reference,) = decode_autoregressively(subject.predictor, [subject.prompt], settings)
        for label, make in writers(subject, settings, size, reference.token_ids).items():
            if sampling.temperature > 0 and label.startswith(LIBRARY):
                continue  # has random numbers of its own
            checked = partial(_checked, make, subject, settings, reference.token_ids)
            attempt(record, f"{name}: {label}", lambda checked=checked: checked()[1])


def speed(record: Record, *, device: str, model: str, vocab: int, dtype: str, sizes: dict[str, Any]) -> None:
    """Of all who write, with a counting model of this size and drafts that are right with a given probability."""
    size = Sizes(**sizes)
    place = torch.device(device)
    attempt(record, "square product", partial(_product, place, dtype))
    subject = counting_subject(place, model, vocab, dtype, size.prompt)
    settings = _settings(GREEDY, size)
    (reference,) = decode_autoregressively(subject.predictor, [subject.prompt], settings)
    call = f"a call, {1 + size.drafted} tokens, {size.slots} slots, graphs"
    attempt(record, call, partial(call_costs, subject, settings, size))
    makers = writers(subject, settings, size, reference.token_ids)
    _compare(record, makers, subject, settings, size, reference, dtype)


def shipped(record: Record, *, device: str, sizes: dict[str, Any]) -> None:
    """Of the adapter that ships with the package, whose drafts are its own; made without graphs: it has a refiner."""
    size = Sizes(**sizes)
    attempt(record, "square product", partial(_product, torch.device(device), "float32"))
    predictor = load_network().to(device)
    plain = load_backbone(predictor.config.backbone).to(device).eval()  # pyright: ignore[reportArgumentType]
    subject = Subject(predictor, plain, held_out_prompt(predictor, size.prompt))
    settings = GenerationSettings(GREEDY, size.new, window_length=predictor.config.window_length)
    lengths, _, budget = measured_budget(predictor, settings)
    settings = GenerationSettings(GREEDY, size.new, window_length=settings.window_length, slot_budget=budget)
    (reference,) = decode_autoregressively(predictor, [subject.prompt], settings)
    ours = {
        f"{QUADRATIC}, {budget} slots": partial(decode_partially_quadratically, lengths=lengths),
        "speculative": decode_speculatively,
    }
    makers = {
        LIBRARY: partial(library, subject, settings),
        ONE_TOKEN_GRAPHS: partial(of_one_shape, subject, settings),
        ONE_TOKEN: _ours(decode_autoregressively, subject, settings),
        **{label: _ours(decode, subject, settings) for label, decode in ours.items()},
        LIBRARY_GRAPHS: partial(library_with_graphs, subject, settings),
    }
    _compare(record, makers, subject, settings, size, reference, "float32")


def writers(
    subject: Subject, settings: GenerationSettings, size: Sizes, reference: Sequence[int]
) -> dict[str, Callable[[], Write]]:
    """Everyone who can write the text, by name. What they need is made when they are called: it may be what fails."""
    predictor = subject.predictor
    guesses = guessed(reference, size.right, predictor)
    lengths = CorrectLengths.geometric(size.right, size.drafted)
    branches = best_branches(size.drafted, size.slots, size.right)
    drafter = Guesses(StudentDrafter(predictor.config.objective, predictor.sampler(settings.sampling)), guesses)
    quadratic = partial(decode_partially_quadratically, drafter=drafter, lengths=lengths)
    return {
        LIBRARY: partial(library, subject, settings),
        ONE_TOKEN_GRAPHS: partial(of_one_shape, subject, settings),
        ONE_TOKEN: _ours(decode_autoregressively, subject, settings),
        "speculative": _ours(partial(decode_speculatively, drafter=drafter), subject, settings),
        QUADRATIC: _ours(quadratic, subject, settings),
        QUADRATIC_GRAPHS: partial(of_one_shape, subject, settings, branches, guesses),
        LIBRARY_GRAPHS: partial(library_with_graphs, subject, settings),
    }


def library(subject: Subject, settings: GenerationSettings, **options: Any) -> Write:
    """`transformers.generate`, greedily.

    No hook counts its calls, as in an evaluation: a model with another hook is compiled anew.
    """
    plain, prompt = subject.plain, subject.prompt
    input_ids = torch.tensor([prompt], device=plain.device)

    def write() -> tuple[list[int], int]:
        output = plain.generate(  # pyright: ignore[reportCallIssue]
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

    return write


def library_with_graphs(subject: Subject, settings: GenerationSettings) -> Write:
    """The same with what transformers has for it: a static cache, and on a GPU a compiled model with CUDA graphs."""
    compiled = {"compile_config": CompileConfig(mode="reduce-overhead")} if subject.plain.device.type == "cuda" else {}
    return library(subject, settings, cache_implementation="static", **compiled)


def of_one_shape(
    subject: Subject, settings: GenerationSettings, branches: Sequence[int] = (), guesses: Tensor | None = None
) -> Write:
    """See `CapturedDecoder`."""
    decoder = CapturedDecoder(subject.predictor, settings, len(subject.prompt), branches, guesses)
    return lambda: decoder.decode(subject.prompt)


def call_costs(subject: Subject, settings: GenerationSettings, size: Sizes) -> dict[str, Figure]:
    """A call of one shape, in steps of one token, and from which rate of right tokens on it pays."""
    predictor, prompt = subject.predictor, subject.prompt
    branches = best_branches(size.drafted, size.slots, size.right)
    wait = partial(clock, predictor.base_model.device)
    step, call = (
        min(
            decoder.call_seconds(prompt, min(NUM_TIMED_CALLS, size.new // (1 + size.drafted)), wait)
            for _ in range(1 + size.repetitions)
        )
        for decoder in (CapturedDecoder(predictor, settings, len(prompt), shape) for shape in ((), branches))
    )
    return {
        "step_ms": MILLISECONDS_PER_SECOND * step,
        "ms_per_call": MILLISECONDS_PER_SECOND * call,
        "steps": call / step,
        "break_even_right": break_even(branches, call / step),
    }


@dataclass(frozen=True)
class Guesses:
    """Lets the predictor propose, and proposes something else.

    Args:
        own: what the predictor proposes.
        tokens: `[M]`, what is proposed at each place of the text.
    """

    own: StudentDrafter
    tokens: Tensor

    def __call__(self, slot_logits: Tensor, auxiliaries: Tensor, starts: Sequence[int]) -> Tensor:
        """See `Drafter`."""
        self.own(slot_logits, auxiliaries, starts)
        offsets = torch.arange(auxiliaries.shape[1], device=self.tokens.device)
        places = torch.tensor(starts, device=self.tokens.device).unsqueeze(1) + offsets
        return self.tokens[places.clamp_max(len(self.tokens) - 1)]


def guessed(reference: Sequence[int], right: float, predictor: PredictorNetwork) -> Tensor:
    """The text, each token right with a given probability."""
    tokens = torch.tensor(reference)
    is_right = torch.rand(len(tokens), generator=torch.Generator().manual_seed(7)) < right
    other = (tokens + 1) % predictor.base_model.config.vocab_size
    return torch.where(is_right, tokens, other).to(predictor.base_model.device)


def _settings(sampling: SamplingConfig, size: Sizes) -> GenerationSettings:
    return GenerationSettings(sampling, size.new, window_length=1 + size.drafted, slot_budget=size.slots)


def _ours(decode: Callable[..., list[Decoded]], subject: Subject, settings: GenerationSettings) -> Callable[[], Write]:
    def write() -> tuple[list[int], int]:
        (decoded,) = decode(subject.predictor, [subject.prompt], settings)
        return decoded.token_ids, decoded.num_calls

    return lambda: write


def _has_graphs(label: str, device: torch.device) -> str:
    """Whether CUDA graphs were replayed; for a compiled model, as torch says, which may have decided against them."""
    if device.type != "cuda" or label not in WITH_GRAPHS:
        return "no"
    if label != LIBRARY_GRAPHS:
        return "yes"
    try:
        from torch._inductor.cudagraph_trees import get_manager

        manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
        return "yes" if manager is not None and manager.roots else "no, torch made none"
    except (ImportError, AttributeError):  # of another version of torch
        return "unknown"


def _compare(
    record: Record,
    makers: Mapping[str, Callable[[], Write]],
    subject: Subject,
    settings: GenerationSettings,
    size: Sizes,
    reference: Decoded,
    dtype: str,
) -> None:
    """Check and time everyone; speeds are also given in those of the baselines.

    Transformers with graphs comes last, because it compiles for a long time; what it does not reach is lost.
    """
    rates: dict[str, float] = {}
    for label, make in makers.items():

        def measure(label: str = label, make: Callable[[], Write] = make) -> dict[str, Figure]:
            write, said = _checked(make, subject, settings, reference.token_ids)
            seconds, num_calls = _fastest(write, subject.plain.device, size.repetitions)
            rates[label] = len(reference.token_ids) / seconds
            return {
                "dtype": dtype,
                "tokens_per_s": rates[label],
                "ms_per_call": MILLISECONDS_PER_SECOND * seconds / num_calls,
                "tokens_per_call": len(reference.token_ids) / num_calls,
                "x_transformers": _in(rates, label, LIBRARY),
                "x_one_token_graphs": _in(rates, label, ONE_TOKEN_GRAPHS),
                "graphs": _has_graphs(label, subject.plain.device),
                **said,
            }

        attempt(record, label, measure)
    if LIBRARY_GRAPHS in rates:
        baseline = rates.pop(LIBRARY_GRAPHS)
        record(Row(f"in speeds of {LIBRARY_GRAPHS}", {label: rate / baseline for label, rate in rates.items()}))


def _checked(
    make: Callable[[], Write], subject: Subject, settings: GenerationSettings, reference: Sequence[int]
) -> tuple[Write, dict[str, Figure]]:
    """Who writes, once it has written the reference text in each warm-up.

    Raises:
        ValueError: its text is another one, by more than rounding.
    """
    write = make()
    same = len(reference)
    for _ in range(NUM_WARM_UP):
        found, _ = write()
        place = first_difference(found, reference)
        if place is None:
            continue
        if place >= min(len(found), len(reference)) or not is_explained_by_rounding(
            subject.predictor, subject.prompt, reference, place, found[place], settings
        ):
            raise ValueError(f"expected the text of one token a call, found another one from token {place} on")
        same = min(same, place)
    return write, {"same_tokens": f"{same} of {len(reference)}"}


def _fastest(write: Write, device: torch.device, repetitions: int) -> tuple[float, int]:
    """Seconds of the fastest text, and its calls."""
    measured = []
    for _ in range(repetitions):
        begin = _now(device)
        _, num_calls = write()
        measured.append((_now(device) - begin, num_calls))
    return min(measured)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _in(rates: Mapping[str, float], label: str, other: str) -> float | None:
    return rates[label] / rates[other] if other in rates else None


def _product(device: torch.device, dtype: str) -> dict[str, Figure]:
    return {"dtype": dtype, "tflops": gemm_rate(device, getattr(torch, dtype)) / GFLOPS_PER_TFLOP}
