"""`model.generate` of transformers, with several verified tokens per call.

    model.generate(**inputs, do_sample=True, max_new_tokens=64, custom_generate=CustomGenerate(predictor))

Arguments keep their meaning: `GenerationConfig` says how to sample and when to stop, stopping criteria are called after
every token, a streamer gets all tokens that a call verified at once, and the result is a tensor of prompts with their
texts. Logits processors other than those of temperature, top-k, top-p, min-p, the repetition penalty and n-grams that
may not repeat are refused, because u picks tokens from distributions that only these shape.

transformers does not pass `tokenizer` on to a callable, so that `stop_strings` needs
`CustomGenerate(predictor, tokenizer)`, or `generate_with_predictor`.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.text import DECODERS
from ptp_lightning.export.checkpoint import build_network
from ptp_lightning.export.hub import HubId, download
from ptp_lightning.export.stored_predictor import EXPORTED_FILES, PREDICTOR_FOLDER, read_predictor
from ptp_lightning.models.attention.eager_attention import needs_eager_attention
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.option_names import DEFAULT_DECODER, DecoderName
from ptp_lightning.sampling import SamplingConfig

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteria,
        StoppingCriteriaList,
    )
    from transformers.generation.streamers import BaseStreamer

# Logits processors, and where the sampling settings and the processors hold their value.
SUPPORTED_PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
    "NoRepeatNGramLogitsProcessor": ("no_repeat_ngram_size", "ngram_size"),
}
PROCESSORS_WITHOUT_EFFECT = ("LogitNormalization",)  # on the distribution
CRITERIA_IN_SETTINGS = ("MaxLengthCriteria", "EosTokenCriteria")
MAX_SEED = 2**62
IGNORED_OPTIONS = ("trust_remote_code", "custom_generate")
CACHED_NETWORK = "_parallel_token_predictor"


class CustomGenerate:
    """The argument `custom_generate` of `generate` of a predictor's base model.

    Args:
        predictor: its student drafts, and its base model verifies.
        tokenizer: for `stop_strings`.
    """

    def __init__(self, predictor: PredictorNetwork, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._predictor = predictor
        self._tokenizer = tokenizer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        seed: int | None = None,
        decoder: DecoderName = DEFAULT_DECODER,
        window_length: int | None = None,
        num_draft_tokens: int | None = None,
        slot_budget: int = 16,
        stop_strings: str | list[str] | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Continue `input_ids`, `[B, S]`, padded on the left.

        Args:
            model: the base model.
            input_ids: prompts.
            logits_processor: made by transformers from the generation settings.
            stopping_criteria: likewise.
            generation_config: the generation settings.
            seed: of the auxiliaries. Equal seeds give equal texts with every decoder. By default torch's own generator
                draws it, so that `torch.manual_seed` has its usual effect.
            decoder: as in `ptp_lightning.decoding.generate`.
            window_length: likewise.
            num_draft_tokens: likewise.
            slot_budget: likewise.
            stop_strings: each text ends with the token that completes one of them; by default those of the settings.
            **model_kwargs: `attention_mask` is used.

        Returns:
            `[B, S + longest]`: prompts and texts; shorter texts are padded on the right with the padding token.

        Raises:
            ValueError: this is not the predictor's base model, or a setting is not supported; names it.
        """
        with _stream_of_caller() as streamer:
            predictor = self._predictor
            if model is not predictor.base_model:
                raise ValueError(
                    "expected the base model of the predictor, found another model: call predictor.base_model.generate"
                )
            _require_supported(logits_processor, generation_config, decoder)
            if seed is None:
                seed = int(torch.randint(MAX_SEED, ()))
            if streamer is not None and len(input_ids) > 1:
                raise ValueError(
                    f"expected a single prompt with a streamer, found {len(input_ids)}: leave streamer out"
                )
            mask = model_kwargs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
            limit = _max_new_tokens(generation_config, input_ids.shape[1], prompts, predictor.max_positions)
            settings = GenerationSettings(
                sampling=self._sampling(logits_processor, generation_config),
                max_new_tokens=limit,
                # Each prompt has auxiliaries of its own, so that equal prompts get different samples.
                seed=tuple(seed + row for row in range(len(prompts))),
                end_of_text=_end_of_text(generation_config),
                window_length=predictor.config.window_length if window_length is None else window_length,
                num_draft_tokens=num_draft_tokens,
                slot_budget=slot_budget,
            )
            criteria = self._with_stop_strings(stopping_criteria, stop_strings or generation_config.stop_strings)
            receiver = _Receiver(input_ids, criteria, streamer)
            decoded = DECODERS[decoder](predictor, prompts, settings, receiver)
            padding = generation_config.pad_token_id
            padding_id = padding if isinstance(padding, int) else 0
            longest = max(len(text.token_ids) for text in decoded)
            rows = [text.token_ids + [padding_id] * (longest - len(text.token_ids)) for text in decoded]
            return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], dim=1)

    def _with_stop_strings(
        self, criteria: Iterable[StoppingCriteria], stop_strings: str | list[str] | None
    ) -> list[StoppingCriteria]:
        """Add the criterion of transformers, unless it is there already."""
        from transformers import StopStringCriteria

        given = list(criteria)
        if not stop_strings or any(isinstance(one, StopStringCriteria) for one in given):
            return given
        if self._tokenizer is None:
            raise ValueError(
                "expected a tokenizer with stop_strings, found none: call CustomGenerate(predictor, tokenizer), "
                "because transformers does not pass the tokenizer of generate on"
            )
        return [*given, StopStringCriteria(self._tokenizer, stop_strings)]

    def _sampling(self, logits_processor: LogitsProcessorList, generation_config: GenerationConfig) -> SamplingConfig:
        sampling = SamplingConfig(order=self._predictor.config.sampling.order, **_values(logits_processor))
        return sampling if generation_config.do_sample else replace(sampling, temperature=0.0)


class _Receiver:
    """Receives the tokens that each cycle commits: ends texts by stopping criteria, and feeds a streamer.

    Args:
        input_ids: `[B, S]`, prompts as transformers has them.
        criteria: of transformers. Those that are part of `GenerationSettings` are left out.
        streamer: of a single text.
    """

    def __init__(self, input_ids: Tensor, criteria: Iterable[StoppingCriteria], streamer: BaseStreamer | None) -> None:
        self._input_ids = input_ids
        self._criteria: list[Any] = [one for one in criteria if type(one).__name__ not in CRITERIA_IN_SETTINGS]
        self._streamer = streamer
        self._texts: list[list[int]] = [[] for _ in input_ids]

    def __call__(self, row: int, new: list[int]) -> int | None:
        """See `OnTokens`."""
        end = self._first_stop(row, new) if self._criteria else None
        self._texts[row] += new[:end]
        if self._streamer is not None:  # all tokens of a call at once, as in assisted generation of transformers
            self._streamer.put(self._input_ids.new_tensor(new[:end]).cpu())
        return end

    def _first_stop(self, row: int, new: list[int]) -> int | None:
        """How many of the new tokens belong to the text, if it ends with one of them."""
        for count in range(1, len(new) + 1):
            text = self._input_ids.new_tensor(self._texts[row] + new[:count])
            so_far = torch.cat([self._input_ids[row], text]).unsqueeze(0)
            if any(bool(one(so_far, None).all()) for one in self._criteria):
                return count
        return None


def _end_of_text(generation_config: GenerationConfig) -> frozenset[int]:
    ends: int | list[int] | None = generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def generate_with_folder(model: PreTrainedModel, inputs: Tensor | None = None, **options: Any) -> Tensor:
    """What `custom_generate/generate.py` of a folder written by `save_with_base_model` runs.

    The first call reads the predictor from the folder and builds it around the model: the model's linear layers get the
    gated adapter, its weights are frozen, and its attention becomes sdpa. With the gate closed, as it is outside of
    this function, the model computes what it did before. The predictor is kept on the model for later calls.

    Args:
        model: opened from such a folder or repository.
        inputs: as in `model.generate`.
        **options: likewise.

    Raises:
        FileNotFoundError: the model was opened from elsewhere.
    """
    predictor: PredictorNetwork | None = model.__dict__.get(CACHED_NETWORK)
    if predictor is None:
        folder = _folder_of(model) / PREDICTOR_FOLDER
        if not needs_eager_attention(model):  # those get an attention that takes boolean masks below, as most do
            model.set_attn_implementation("sdpa")  # which takes our boolean masks
        # The folder's own code is running already, so its user trusts it.
        network = build_network(read_predictor(folder), model=model, trust_custom_classes=True)
        predictor = network.to(model.device)
        model.__dict__[CACHED_NETWORK] = predictor  # not as a submodule, because the predictor holds the model
    return generate_with_predictor(predictor, inputs, **options)


def generate_with_predictor(predictor: PredictorNetwork, inputs: Tensor | None = None, **options: Any) -> Tensor:
    """`predictor.base_model.generate` with several verified tokens per call.

    Args:
        predictor: its student drafts, and its base model verifies.
        inputs: as in `model.generate`.
        **options: likewise; also `seed`, `decoder`, `window_length`, `num_draft_tokens` and `slot_budget`, see
            `CustomGenerate`.

    Raises:
        ValueError: an option is not supported; names it.
    """
    from transformers import StopStringCriteria

    model: Any = predictor.base_model
    given = {name: value for name, value in options.items() if value is not None and name not in IGNORED_OPTIONS}
    tokenizer, stop_strings = given.pop("tokenizer", None), given.pop("stop_strings", None)
    config = given.get("generation_config")
    if stop_strings is None and config is not None and config.stop_strings is not None:
        stop_strings, config = config.stop_strings, copy.deepcopy(config)
        given["generation_config"], config.stop_strings = config, None  # transformers would want a tokenizer for them
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("expected a tokenizer with stop_strings, found none: set tokenizer")
        criteria = list(given.get("stopping_criteria", []))
        given["stopping_criteria"] = [*criteria, StopStringCriteria(tokenizer, stop_strings)]
    # Of the class, because the generate method of a model that was opened with code of its own may be that code.
    result = type(model).generate(model, inputs, custom_generate=CustomGenerate(predictor), **given)
    assert isinstance(result, Tensor)
    return result


@contextmanager
def _stream_of_caller() -> Iterator[BaseStreamer | None]:
    """The `streamer` of the call of transformers' `generate` in which this runs; its stream ends with the block.

    transformers gives the prompt to the streamer but does not pass it on to a callable, which would leave a reader of
    the stream, in another thread, waiting for ever. So it is read from the caller's frame.
    """
    from transformers import GenerationMixin

    generate: Any = GenerationMixin.generate  # pyright: ignore[reportAttributeAccessIssue]
    code = inspect.unwrap(generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    streamer = None if frame is None else frame.f_locals.get("streamer")
    del frame  # which would keep everything alive that the caller's frames hold
    try:
        yield streamer
    except BaseException:
        # The server of transformers, whose streamers can be cancelled, tells its client of the error by itself.
        if streamer is not None and not hasattr(streamer, "cancel"):
            streamer.end()
        raise
    if streamer is not None:
        streamer.end()


def _folder_of(model: PreTrainedModel) -> Path:
    opened = str(model.name_or_path)
    if Path(opened).is_dir():
        return Path(opened)
    commit = getattr(model.config, "_commit_hash", None)
    return download(HubId(opened, commit), [f"{PREDICTOR_FOLDER}/{name}" for name in EXPORTED_FILES])


def _require_supported(
    logits_processor: LogitsProcessorList, generation_config: GenerationConfig, decoder: str
) -> None:
    if decoder not in DECODERS:
        raise ValueError(f"expected decoder to be one of {', '.join(DECODERS)}, found {decoder!r}")
    for processor in logits_processor:
        name = type(processor).__name__
        if name not in (*SUPPORTED_PROCESSORS, *PROCESSORS_WITHOUT_EFFECT):
            raise ValueError(
                f"expected no logits processors but {', '.join(name for name, _ in SUPPORTED_PROCESSORS.values())}, "
                f"found {name}: leave its setting out of generate"
            )
        if isinstance(getattr(processor, "prompt_ignore_length", None), int):
            raise ValueError(f"expected a repetition penalty of the whole prompt, found a {name} of a part of it")
    for name, expected in (("num_beams", 1), ("num_return_sequences", 1), ("return_dict_in_generate", False)):
        found = _or(getattr(generation_config, name), expected)
        if found != expected:
            raise ValueError(f"expected {name}={expected} with this custom_generate, found {found}")


def _values(logits_processor: LogitsProcessorList) -> dict[str, Any]:
    """Sampling settings of supported processors."""
    values: dict[str, Any] = {}
    for processor in logits_processor:
        if type(processor).__name__ in SUPPORTED_PROCESSORS:
            name, attribute = SUPPORTED_PROCESSORS[type(processor).__name__]
            if name in values:
                raise ValueError(f"expected one logits processor for {name}, found two: leave one of them out")
            values[name] = getattr(processor, attribute)
    return values


def _max_new_tokens(
    generation_config: GenerationConfig, prompt_length: int, prompts: list[list[int]], limit: int | None
) -> int:
    """What was asked for, or what the base model has positions for: `transformers serve` asks for 1024 by default."""
    assert generation_config.max_length is not None  # into which `generate` has turned max_new_tokens
    wanted = generation_config.max_length - prompt_length
    longest = max(map(len, prompts))
    if limit is None or longest + wanted <= limit or longest >= limit:
        return wanted
    warnings.warn(
        f"expected prompt + max_new_tokens <= {limit} tokens (the base model's positions), found {longest} + {wanted}: "
        f"the text ends after {limit - longest} tokens",
        stacklevel=2,
    )
    return limit - longest


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
