"""The command `generate`: prompts in, text or JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ptp_lightning.decoding.devices import select_device
from ptp_lightning.decoding.generation import Generation, GenerationSettings
from ptp_lightning.decoding.model_settings import TAKEN_OVER, with_model_settings
from ptp_lightning.decoding.partial_quadratic import require_slots_in_calls
from ptp_lightning.decoding.slot_allocation import expected_tokens
from ptp_lightning.decoding.slot_budget import measure_best_budget
from ptp_lightning.decoding.stop_strings import StopStrings
from ptp_lightning.decoding.text import (
    encode_prompt,
    end_of_text_ids,
    generate,
    generate_batch,
    options_of,
    tokenizer_of,
)
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.export.options import predictor_options, predictor_source
from ptp_lightning.generation.call_marks import LEGEND, mark_cycles, print_marked
from ptp_lightning.generation.comparison import (
    compare_decoders,
    comparison_as_json,
    comparison_lines,
)
from ptp_lightning.generation.page import Section, html_page
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.option_names import DecoderName
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.atomic_files import write_atomically
from ptp_lightning.utils.chat_templates import require_chat_template
from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.text_files import read_lines
from ptp_lightning.utils.user_errors import warnings_as_notes

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from transformers import PreTrainedTokenizerBase

MILLISECONDS_PER_SECOND = 1000
WARM_UP_TOKENS = 8
CHAT_SEPARATOR = "\n\n"  # between a user's turn and the answer
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", *TAKEN_OVER)


def run(options: Namespace) -> None:
    """Continue the prompts that the options give, one after another.

    Raises:
        ValueError: an option is out of range, or a prompt is empty or too long; before the first token.
        FileNotFoundError: the checkpoint or the file of prompts is not there.
    """
    source = predictor_source(options)
    prompts = _prompts(options.prompt, options.prompts)
    StopStrings(options.stop)  # refuses an empty one
    if options.batch_size < 1:
        raise ValueError(f"expected --batch_size >= 1, found {options.batch_size}")
    _require_consistent(options)
    settings = _settings(options)  # refuses values out of range before the model is loaded
    device = select_device(options.device)
    with warnings_as_notes():
        predictor = load_network(source, **predictor_options(options)).to(device)
    tokenizer = tokenizer_of(predictor)
    encoded = _encoded(prompts, options, predictor, tokenizer, settings)
    settings = _completed(settings, options, predictor, end_of_text_ids(predictor, tokenizer, chat=options.chat))
    common: Any = {"decoder": options.decoder, "stop": options.stop, "tokenizer": tokenizer}
    compare = None
    if options.compare:
        base_model = load_backbone(predictor.config.backbone).to(device)  # pyright: ignore[reportArgumentType]
        compare = partial(compare_decoders, predictor, base_model, settings=settings, **common)
    separator = CHAT_SEPARATOR if options.chat else ""  # between prompt and text
    shows_cycles = options.show_calls or options.html is not None
    sections: list[Section] = []
    _warm_up(predictor, encoded[0], settings, options.decoder, tokenizer)
    for first in range(0, len(prompts), options.batch_size):
        some = prompts[first : first + options.batch_size]
        streams = len(some) == 1 and not options.json and not options.show_calls
        if streams:
            print("\n" * min(first, 1) + some[0] + separator, end="", flush=True)
        generations = generate_batch(
            predictor,
            some,
            chat=options.chat,
            system=options.system,
            on_text=_stream if streams else None,
            **options_of(settings),
            **common,
        )
        for number, generation in enumerate(generations, start=first):
            measured = [] if compare is None else compare(encoded[number], num_tokens=generation.num_tokens)
            before = generation.prompt + separator
            cost = "\n".join([_summary(generation), *comparison_lines(measured)])
            cycles = mark_cycles(generation, encoded[number], tokenizer) if shows_cycles else []
            sections.append(Section(before, cycles, cost))
            if options.json:
                print(json.dumps(as_json(generation) | comparison_as_json(measured)), flush=True)
                continue
            if not streams and number > 0:
                print()
            if options.show_calls:
                print_marked(before, cycles)
            else:
                print("" if streams else before + generation.text)
            print(f"\n{cost}", flush=True)
    if not options.json:
        print("\n".join(_closing_lines(options)), end="")
    if options.html is not None:
        write_atomically(local_path(options.html, "--html", WRITTEN), html_page(sections).encode())


def _encoded(
    prompts: Sequence[str],
    options: Namespace,
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
) -> list[list[int]]:
    """Token ids of all prompts; refuses one that cannot be continued before the first text is written."""
    if options.chat:
        require_chat_template(tokenizer, "--chat")
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            encoded.append(
                encode_prompt(predictor, prompt, tokenizer, settings, chat=options.chat, system=options.system)
            )
        except ValueError as error:
            where = f"{options.prompts}, prompt {number}" if options.prompts is not None else "--prompt"
            raise ValueError(f"{where}: {error}") from error
    return encoded


def _require_consistent(options: Namespace) -> None:
    """Refuse options that contradict each other."""
    if options.system is not None and not options.chat:
        raise ValueError("expected --system with --chat, found it alone: add --chat, or leave --system out")
    if options.compare and options.batch_size > 1:
        raise ValueError(
            f"expected --batch_size 1 with --compare, which measures one text at a time, found {options.batch_size}: "
            "leave one of them out"
        )
    if options.show_calls and options.json:
        raise ValueError("expected one of --show_calls, which is for people, and --json, found both: leave one out")
    if options.html is not None:
        file = local_path(options.html, "--html", WRITTEN)
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(f"expected --html to be a file in a folder that exists, found {options.html}: set --html")


def _warm_up(
    predictor: PredictorNetwork,
    prompt: Sequence[int],
    settings: GenerationSettings,
    decoder: DecoderName,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Decode a few tokens, because the first calls pack weights and fill caches of kernels."""
    settings = replace(settings, max_new_tokens=min(WARM_UP_TOKENS, settings.max_new_tokens))
    generate(predictor, prompt, decoder=decoder, tokenizer=tokenizer, **options_of(settings))


def _closing_lines(options: Namespace) -> list[str]:
    """What the marks and numbers mean, once at the end."""
    lines = []
    if options.show_calls:
        lines.append(f"[{LEGEND}]")
    if options.html is not None:
        lines.append(f"[page: {options.html}]")
    if not options.compare and options.decoder != "autoregressive":
        lines.append(
            "[after a warm-up; the base model alone writes one token per call, and --compare measures its speed on the "
            "same prompt]"
        )
    return [*lines, ""]


def _settings(options: Namespace) -> GenerationSettings:
    """Settings from options; what is not given has the default of `GenerationSettings` until the model is loaded."""
    names = ("max_new_tokens", "seed", "window_length", "num_draft_tokens", "slot_budget")
    given = {name: options[name] for name in names if options[name] not in (None, "auto")}
    return GenerationSettings(SamplingConfig(**_given_sampling(options)), **given)


def _given_sampling(options: Namespace) -> dict[str, Any]:
    return {name: options[name] for name in SAMPLING_OPTIONS if options[name] is not None}


def _completed(
    settings: GenerationSettings, options: Namespace, predictor: PredictorNetwork, end_of_text: frozenset[int]
) -> GenerationSettings:
    """Settings with the predictor's own values where no option is given; warns about a mismatch with its training."""
    config = predictor.config
    sampling = replace(config.sampling, **_given_sampling(options))
    if not config.is_trained_for(sampling) and options.decoder not in ("autoregressive", "lookup"):
        trained_for = _describe(config.sampling) if config.sampling_range is None else config.sampling_range
        print(
            f"note: the adapter was trained for {trained_for}; with {_describe(sampling)} the text is still exact, but "
            "fewer tokens per call may be accepted",
            file=sys.stderr,
        )
    with warnings_as_notes():
        sampling = with_model_settings(predictor, sampling, given=_given_sampling(options))
    window_length = settings.window_length if options.window_length else config.window_length
    settings = replace(settings, sampling=sampling, window_length=window_length, end_of_text=end_of_text)
    if options.decoder == "partial_quadratic" and options.slot_budget == "auto":
        require_slots_in_calls(predictor)
        settings = replace(settings, slot_budget=_measured_budget(predictor, settings))
    return settings


def as_json(generation: Generation) -> dict[str, Any]:
    """What `--json` prints for a prompt."""
    keys = ("prompt", "text", "token_ids", "num_calls", "num_tokens", "accepted_per_call", "seconds")
    return {key: getattr(generation, key) for key in keys}


def _prompts(prompt: str | None, file: str | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ValueError(f"expected one of --prompt and --prompts, found {'neither' if prompt is None else 'both'}")
    if prompt is not None:
        return [prompt]
    return [line for _, line in read_lines(str(file), "one prompt per line", "--prompts")]


def _describe(sampling: SamplingConfig) -> str:
    values = {name: getattr(sampling, name) for name in SAMPLING_OPTIONS}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None or name not in TAKEN_OVER)


def _measured_budget(predictor: PredictorNetwork, settings: GenerationSettings) -> int:
    lengths, costs, budget = measure_best_budget(predictor, settings)
    print(
        f"note: --slot_budget {budget}: {costs.seconds_for(budget) * MILLISECONDS_PER_SECOND:.1f} ms a call for "
        f"{expected_tokens(lengths, budget):.2f} tokens, estimated from the predictor's validation",
        file=sys.stderr,
    )
    return budget


def _stream(_: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _summary(generation: Generation) -> str:
    return (
        f"[{generation.num_tokens} tokens in {generation.num_calls} calls: {generation.accepted_per_call:.2f} tokens "
        f"per call, {generation.seconds:.2f} s, {generation.num_tokens / generation.seconds:.1f} tokens per second]"
    )
