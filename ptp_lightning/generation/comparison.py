"""Speeds on one prompt: a decoder, the one with one token per call, and `transformers.generate` as people run it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.text import generate, options_of
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.option_names import DecoderName

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTOREGRESSIVE = "autoregressive"
TRANSFORMERS = "transformers.generate"
DESCRIPTIONS = {
    AUTOREGRESSIVE: "one token per call, this package's loop",
    TRANSFORMERS: "one token per call, transformers.generate",
}
WARM_UP_TOKENS = 16  # packs weights, fills caches of kernels


@dataclass(frozen=True)
class Measurement:
    """A text and what it cost.

    Attributes:
        decoder: a name in `DECODERS`, or `TRANSFORMERS`.
        token_ids: the new tokens.
        num_calls: forward passes of the base model.
        seconds: wall-clock time.
        is_sampled: whether the decoder drew random numbers of its own, so that its text is another sample.
    """

    decoder: str
    token_ids: list[int]
    num_calls: int
    seconds: float
    is_sampled: bool = False

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second."""
        return len(self.token_ids) / self.seconds

    @property
    def tokens_per_call(self) -> float:
        """New tokens per forward pass."""
        return len(self.token_ids) / self.num_calls

    def times_as_fast(self, other: Measurement) -> float:
        """Ratio of the speeds.

        >>> fast, slow = Measurement("speculative", [5, 6, 7], 2, 0.5), Measurement("autoregressive", [5, 6, 7], 3, 1.0)
        >>> fast.times_as_fast(slow)
        2.0
        """
        return self.tokens_per_second / other.tokens_per_second


def compare_decoders(
    predictor: PredictorNetwork,
    base_model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    settings: GenerationSettings,
    decoder: DecoderName,
    num_tokens: int,
    stop: str | Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase,
) -> list[Measurement]:
    """Measure a decoder, the decoder with one token per call, and `transformers.generate`, after a warm-up of each.

    Args:
        predictor: in eval mode.
        base_model: the base model as `transformers` loads it, without an adapter and packed weights.
        prompt: token ids.
        settings: with a single seed; `transformers` gets the same sampling settings, and the seed for torch.
        decoder: to measure.
        num_tokens: length of the text; `transformers.generate`, whose samples differ, writes at most as many.
        stop: one or several strings before which a text ends.
        tokenizer: of the base model.
    """
    own = partial(_measure_own, predictor, prompt, settings, stop, tokenizer)
    decoders: dict[str, Callable[[int], Measurement]] = {
        name: partial(own, name) for name in dict.fromkeys((decoder, AUTOREGRESSIVE))
    }
    decoders[TRANSFORMERS] = partial(_measure_transformers, base_model, prompt, settings)
    lengths = dict.fromkeys(decoders, settings.max_new_tokens) | {TRANSFORMERS: num_tokens}
    for name, measure in decoders.items():
        measure(min(WARM_UP_TOKENS, lengths[name]))
    return [measure(lengths[name]) for name, measure in decoders.items()]


def comparison_lines(measured: Sequence[Measurement]) -> list[str]:
    """What `generate --compare` prints: the first decoder, then each other one in comparison to it."""
    lines: list[str] = []
    for other in measured:
        name = DESCRIPTIONS.get(other.decoder, other.decoder)
        line = f"{name}: {other.tokens_per_second:.1f} tokens per second, {other.tokens_per_call:.2f} tokens per call"
        if lines:
            first = measured[0]
            line += f"; {first.decoder} is {first.times_as_fast(other):.2f} times as fast, {_agreement(first, other)}"
        lines.append(f"[{line}]")
    return lines


def comparison_as_json(measured: Sequence[Measurement]) -> dict[str, Any]:
    """What `generate --compare --json` adds to a line; nothing without measurements."""
    rows = [
        {
            "decoder": one.decoder,
            "tokens_per_second": one.tokens_per_second,
            "tokens_per_call": one.tokens_per_call,
            "num_tokens": len(one.token_ids),
            "same_text": one.token_ids == measured[0].token_ids,
        }
        for one in measured
    ]
    return {"comparison": rows} if rows else {}


def _agreement(first: Measurement, other: Measurement) -> str:
    if first.token_ids == other.token_ids:
        return "the texts agree"
    num_equal = next(
        (k for k, pair in enumerate(zip(first.token_ids, other.token_ids, strict=False)) if pair[0] != pair[1]),
        min(len(first.token_ids), len(other.token_ids)),
    )
    if other.is_sampled:
        return "which draws a sample of its own"
    return f"the texts differ from token {num_equal} on"


def generate_arguments(settings: GenerationSettings) -> dict[str, Any]:
    """The settings as arguments of `generate`, which also applies penalties, temperature, top-k, top-p and min-p so."""
    sampling = settings.sampling
    chosen: dict[str, Any] = {
        "do_sample": sampling.temperature > 0,
        "repetition_penalty": float(sampling.repetition_penalty or 1.0),
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size or 0,
    }
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
        chosen["min_p"] = sampling.min_p or 0.0
    ends = sorted(settings.end_of_text)
    return {
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": ends or None,
        "pad_token_id": ends[0] if ends else 0,
        **chosen,
    }


def _measure_own(
    predictor: PredictorNetwork,
    prompt: Sequence[int],
    settings: GenerationSettings,
    stop: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    decoder: DecoderName,
    max_new_tokens: int,
) -> Measurement:
    generation = generate(
        predictor,
        prompt,
        decoder=decoder,
        stop=stop,
        tokenizer=tokenizer,
        **options_of(replace(settings, max_new_tokens=max_new_tokens)),
    )
    return Measurement(decoder, generation.token_ids, generation.num_calls, generation.seconds)


@torch.inference_mode()
def _measure_transformers(
    model: PreTrainedModel, prompt: Sequence[int], settings: GenerationSettings, max_new_tokens: int
) -> Measurement:
    assert isinstance(settings.seed, int)
    torch.manual_seed(settings.seed)
    input_ids = torch.tensor([list(prompt)], device=model.device)
    arguments = generate_arguments(settings) | {"max_new_tokens": max_new_tokens}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about generation settings that the arguments replace
        begin = perf_counter()
        output: Any = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **arguments)  # pyright: ignore[reportCallIssue]
        token_ids: list[int] = output[0, len(prompt) :].tolist()
        seconds = perf_counter() - begin
    return Measurement(TRANSFORMERS, token_ids, len(token_ids), seconds, is_sampled=settings.sampling.temperature > 0)
