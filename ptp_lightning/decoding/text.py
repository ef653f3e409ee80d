"""From a prompt to its continuation as text: tokenise, decode, and detokenise verified tokens as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

from ptp_lightning.decoding.autoregressive import decode_autoregressively
from ptp_lightning.decoding.generation import Decoded, Generation, GenerationSettings, OnTokens, require_room
from ptp_lightning.decoding.model_settings import OF_ADAPTER, with_model_settings
from ptp_lightning.decoding.partial_quadratic import decode_partially_quadratically
from ptp_lightning.decoding.speculative import decode_by_lookup, decode_speculatively
from ptp_lightning.decoding.stop_strings import StopStrings
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.option_names import DEFAULT_DECODER, DecoderName
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.chat_templates import chat_prompt, end_of_turn_ids, require_chat_template, user_message
from ptp_lightning.utils.pretrained import PATH_KEY, load_tokenizer
from ptp_lightning.utils.text_tokens import text_ids
from ptp_lightning.utils.whole_numbers import whole_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Decoder(Protocol):
    """Continues several prompts; see `decode_autoregressively`."""

    def __call__(
        self,
        predictor: PredictorNetwork,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        on_tokens: OnTokens | None = None,
        *,
        timer: PhaseTimer | None = None,
    ) -> list[Decoded]: ...


DECODERS: dict[str, Decoder] = {
    "autoregressive": decode_autoregressively,
    "speculative": decode_speculatively,
    "speculative_lookup": partial(decode_speculatively, lookup=True),
    "lookup": decode_by_lookup,
    "partial_quadratic": decode_partially_quadratically,
}
INCOMPLETE = "\ufffd"  # the replacement character, for bytes that are not a character, or not yet
NUM_PROMPT_TOKENS_BEFORE = 8  # tokens of the prompt that decide about blanks and bytes at the start of the text


class Options(TypedDict, total=False):
    """Options of `generate`.

    Attributes:
        max_new_tokens: the largest number of tokens to add; 64 by default.
        sampling: by default the settings that the adapter was trained for; others may lower the acceptance. What they
            leave open (None) is taken from the generation settings of the model's folder: `min_p`,
            `repetition_penalty` and `no_repeat_ngram_size`.
        seed: of the auxiliaries; 0 by default. A tuple holds one for each prompt of a batch.
        decoder: "speculative_lookup" (default), "speculative", "lookup" or "partial_quadratic", with several tokens per
            call, or "autoregressive", the reference, with one.
        window_length: tokens drafted per cycle; by default as in training.
        num_draft_tokens: see `GenerationSettings`.
        slot_budget: slots of a call of partial quadratic decoding; 16 by default. `measure_best_budget` finds the best
            one for a machine.
        end_of_text: token ids that end the text; by default those of the model's generation settings and tokenizer.
        stop: a string before which the text ends, or several. The token that completes one is the last of `token_ids`.
        tokenizer: by default the base model's, which each call loads.
        chat: whether a prompt is the text of a user's turn, which the tokenizer's chat template makes a prompt of. The
            end-of-turn token then ends the text, too. False by default.
        system: with `chat`, the system prompt; by default that of the template, if it has one.
    """

    max_new_tokens: int
    sampling: SamplingConfig | None
    seed: int | tuple[int, ...]
    decoder: DecoderName
    window_length: int | None
    num_draft_tokens: int | None
    slot_budget: int
    end_of_text: Iterable[int] | None
    stop: str | Sequence[str]
    tokenizer: PreTrainedTokenizerBase | None
    chat: bool
    system: str | None


def tokenizer_of(predictor: PredictorNetwork) -> PreTrainedTokenizerBase:
    """The tokenizer of the predictor's base model; errors as in `ptp_lightning.utils.pretrained.load_tokenizer`."""
    backbone = predictor.config.backbone
    return load_tokenizer(predictor.backbone_path, revision=backbone.revision, key=PATH_KEY)


def generate(
    predictor: PredictorNetwork,
    prompt: str | Sequence[int],
    *,
    on_tokens: Callable[[list[int]], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    **options: Unpack[Options],
) -> Generation:
    """Continue a prompt. All decoders return the base model's own sample for the seed, token for token.

    Args:
        predictor: the base model and its adapter, in any mode; see `prepare_for_decoding`.
        prompt: text, or token ids, of at least one token.
        on_tokens: is called with new token ids as soon as they are verified.
        on_text: is called with their text, in whole characters; the pieces add up to `Generation.text`.
        **options: see `Options`.

    Raises:
        ValueError: a value is out of range, the prompt is empty or too long, or has a token the model does not know.
        TypeError: there is no such option.
    """
    (generation,) = generate_batch(
        predictor,
        [prompt],
        on_tokens=None if on_tokens is None else lambda _, token_ids: on_tokens(token_ids),
        on_text=None if on_text is None else lambda _, piece: on_text(piece),
        **options,
    )
    return generation


def generate_batch(
    predictor: PredictorNetwork,
    prompts: Sequence[str | Sequence[int]],
    *,
    on_tokens: OnTokens | None = None,
    on_text: Callable[[int, str], None] | None = None,
    **options: Unpack[Options],
) -> list[Generation]:
    """Continue several prompts side by side; each text is the one that `generate` returns for its prompt alone.

    Args:
        predictor: as in `generate`.
        prompts: as in `generate`, at least one.
        on_tokens: is called with the index of a prompt and its new token ids as soon as they are verified.
        on_text: is called with the index of a prompt and their text.
        **options: see `Options`.

    Raises:
        ValueError: as `generate`.
    """
    _require_known(options)
    tokenizer = options.get("tokenizer") or tokenizer_of(predictor)
    settings, decode = _settings(predictor, tokenizer, options)
    chat, system = options.get("chat", False), options.get("system")
    encoded = [encode_prompt(predictor, prompt, tokenizer, settings, chat=chat, system=system) for prompt in prompts]
    detokenizers = [IncrementalDetokenizer(tokenizer, token_ids) for token_ids in encoded]
    stop_strings = options.get("stop", ())
    stops = [StopStrings(stop_strings) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]

    def write(row: int, piece: str) -> None:
        pieces[row].append(piece)
        if on_text is not None and piece:
            on_text(row, piece)

    def receive(row: int, new_token_ids: list[int]) -> int | None:
        kept = None
        if stop_strings:
            for count, token_id in enumerate(new_token_ids, start=1):
                write(row, stops[row].push(detokenizers[row].push([token_id])))
                if stops[row].found:
                    kept = count
                    break
        else:
            write(row, detokenizers[row].push(new_token_ids))
        if on_tokens is not None:
            on_tokens(row, new_token_ids[:kept])
        return kept

    begin = perf_counter()
    decoded = decode(predictor, encoded, settings, receive)
    seconds = perf_counter() - begin
    for row, (detokenizer, stop) in enumerate(zip(detokenizers, stops, strict=True)):
        write(row, stop.push(detokenizer.flush()) + stop.flush())
    return [
        Generation(
            token_ids=text.token_ids,
            num_calls=text.num_calls,
            finish_reason=text.finish_reason,
            cycles=text.cycles,
            prompt=prompt if isinstance(prompt, str) else _text(tokenizer, token_ids),
            text="".join(written),
            seconds=seconds,
        )
        for text, prompt, token_ids, written in zip(decoded, prompts, encoded, pieces, strict=True)
    ]


def _require_known(options: Options) -> None:
    """Refuse unknown names, which Python does not do for `Unpack`."""
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(
            f"expected options among {', '.join(Options.__annotations__)}, found {', '.join(sorted(unknown))}"
        )


def options_of(settings: GenerationSettings) -> dict[str, Any]:
    """The `Options` of `generate` that give these settings.

    >>> options_of(GenerationSettings(seed=3, num_draft_tokens=5))["num_draft_tokens"]
    5
    """
    return {
        "max_new_tokens": settings.max_new_tokens,
        "sampling": settings.sampling,
        "seed": settings.seed,
        "window_length": settings.window_length,
        "num_draft_tokens": settings.num_draft_tokens,
        "slot_budget": settings.slot_budget,
        "end_of_text": settings.end_of_text,
    }


def _settings(
    predictor: PredictorNetwork, tokenizer: PreTrainedTokenizerBase, options: Options
) -> tuple[GenerationSettings, Decoder]:
    """Settings from options; what is not given comes from the predictor."""
    decoder = options.get("decoder", DEFAULT_DECODER)
    if decoder not in DECODERS:
        raise ValueError(f"expected decoder to be one of {', '.join(DECODERS)}, found {decoder!r}")
    end_of_text, window_length = options.get("end_of_text"), options.get("window_length")
    sampling = options.get("sampling")
    if end_of_text is None:
        end_of_text = end_of_text_ids(predictor, tokenizer, chat=options.get("chat", False))
    settings = GenerationSettings(
        sampling=(
            with_model_settings(predictor, predictor.config.sampling)
            if sampling is None
            else with_model_settings(predictor, sampling, given=OF_ADAPTER)
        ),
        max_new_tokens=options.get("max_new_tokens", 64),
        seed=options.get("seed", 0),
        end_of_text=frozenset(whole_numbers(end_of_text, "end_of_text")),
        window_length=predictor.config.window_length if window_length is None else window_length,
        slot_budget=options.get("slot_budget", 16),
        num_draft_tokens=options.get("num_draft_tokens"),
    )
    return settings, DECODERS[decoder]


def encode_prompt(
    predictor: PredictorNetwork,
    prompt: str | Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
    *,
    chat: bool = False,
    system: str | None = None,
) -> list[int]:
    """Token ids of a prompt; a text begins as `text_ids` says, and as the documents of a training do.

    Args:
        predictor: the model that continues it.
        prompt: text or token ids.
        tokenizer: of the base model.
        settings: of the text.
        chat: see `Options`.
        system: see `Options`.

    Raises:
        ValueError: it is neither text nor integers, empty, too long for `max_new_tokens` more, or has a token the model
            does not know; with `chat`, the tokenizer has no chat template, or the template refuses it.
    """
    if chat:
        if not isinstance(prompt, str):
            raise ValueError("expected the text of a user's turn with chat, found token ids: leave chat out")
        require_chat_template(tokenizer, "chat")
        token_ids = chat_prompt(tokenizer, user_message(prompt, system)) if prompt else []
    else:
        token_ids = text_ids(tokenizer, prompt) if isinstance(prompt, str) else whole_numbers(prompt, "prompt")
    require_room(predictor, len(token_ids), settings)
    vocabulary = predictor.base_model.config.vocab_size
    if unknown := [token_id for token_id in token_ids if not 0 <= token_id < vocabulary]:
        raise ValueError(
            f"expected token ids in 0 .. {vocabulary - 1} (the model's vocabulary), found {unknown[0]} in the prompt"
        )
    return token_ids


def end_of_text_ids(
    predictor: PredictorNetwork, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
) -> frozenset[int]:
    """Tokens that end a text: those of the model's generation settings, the tokenizer's, and in a chat the end of turn.

    Raises:
        ValueError: with `chat`, the tokenizer has no chat template.
    """
    of_model: int | list[int] | None = getattr(predictor.base_model.generation_config, "eos_token_id", None)
    of_tokenizer: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    ids = of_model if isinstance(of_model, list) else [of_model]
    if chat:
        require_chat_template(tokenizer, "chat")
        ids = [*ids, *end_of_turn_ids(tokenizer)]
    return frozenset(token_id for token_id in (*ids, of_tokenizer) if token_id is not None)


class IncrementalDetokenizer:
    """Turns token ids into text, piece by piece, in whole characters; incomplete ones wait for their last bytes.

    Args:
        tokenizer: of the text.
        prompt_ids: tokens before the text; they decide whether the text begins with a blank.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._before = prompt_ids[-NUM_PROMPT_TOKENS_BEFORE:]  # already turned into text
        self._pending: list[int] = []

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._pending += token_ids
        piece = self._piece()
        return "" if piece.endswith(INCOMPLETE) else self._written(piece)

    def flush(self) -> str:
        """The rest of the text; incomplete characters become U+FFFD."""
        return self._written(self._piece())

    def peek(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens would add; nothing is kept. Incomplete characters are U+FFFD."""
        return self._text_after(self._before + self._pending, token_ids)

    def _piece(self) -> str:
        return self._text_after(self._before, self._pending)

    def _text_after(self, token_ids: Sequence[int], more: Sequence[int]) -> str:
        before, both = (_text(self._tokenizer, ids) for ids in ([*token_ids], [*token_ids, *more]))
        return both[len(before) :]

    def _written(self, piece: str) -> str:
        if piece:
            self._before, self._pending = self._pending, []
        return piece


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list only for a batch
    return text
