"""From prompt text to continued text: tokenise, decode, and turn verified tokens back into text as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import torch

from ptp_lightning.decoding.autoregressive import decode_autoregressively
from ptp_lightning.decoding.generation import Generation, GenerationSettings, require_room
from ptp_lightning.decoding.speculative import decode_speculatively
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.pretrained import PATH_KEY, load_tokenizer
from ptp_lightning.sampling import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DecoderName = Literal["autoregressive", "speculative"]
DECODERS = {"autoregressive": decode_autoregressively, "speculative": decode_speculatively}
INCOMPLETE = "\ufffd"  # stands for bytes that are no character, or not one yet
NUM_PROMPT_TOKENS_BEFORE = 8  # what detokenisers look at: blanks and bytes at the seam of prompt and text


def tokenizer_of(predictor: ParallelTokenPredictor) -> PreTrainedTokenizerBase:
    """The tokenizer of the predictor's base model; errors as in `ptp_lightning.pretrained.load_tokenizer`."""
    backbone = predictor.config.backbone
    return load_tokenizer(backbone.path, revision=backbone.revision, key=PATH_KEY)


def generate(
    predictor: ParallelTokenPredictor,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    decoder: DecoderName = "speculative",
    window_length: int | None = None,
    end_of_text: Iterable[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt. Both decoders give what the base model samples for this seed, token for token.

    Args:
        predictor: the base model and its adapter; decodes in eval mode whatever mode it is in.
        prompt: text, or token ids, of at least one token.
        max_new_tokens: the most tokens to add.
        sampling: by default the settings that the adapter was trained for; others may lower the acceptance.
        seed: of the auxiliaries.
        decoder: "speculative", several tokens per call, or "autoregressive", the reference with one.
        window_length: tokens drafted per cycle; by default as in training.
        end_of_text: token ids that end the text; by default those of the model's generation settings and tokenizer.
        tokenizer: by default that of the base model, loaded anew in each call.
        on_tokens: is called with new token ids as soon as they are verified.
        on_text: the same with their text, in whole characters; the pieces add up to `Generation.text`.

    Raises:
        ValueError: a value is out of range, the prompt is empty or too long, or has a token the model does not know.
    """
    if tokenizer is None:
        tokenizer = tokenizer_of(predictor)
    settings = GenerationSettings(
        sampling=sampling or predictor.config.sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        end_of_text=end_of_text_ids(predictor, tokenizer) if end_of_text is None else frozenset(end_of_text),
        window_length=predictor.config.window_length if window_length is None else window_length,
    )
    if decoder not in DECODERS:
        raise ValueError(f"expected decoder to be one of {', '.join(DECODERS)}, found {decoder!r}")
    token_ids = encode_prompt(predictor, prompt, tokenizer, settings)
    detokenizer = IncrementalDetokenizer(tokenizer, token_ids)
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if on_text is not None and piece:
            on_text(piece)

    def receive(new_token_ids: list[int]) -> None:
        if on_tokens is not None:
            on_tokens(new_token_ids)
        write(detokenizer.push(new_token_ids))

    prompt_ids = torch.tensor([token_ids], device=predictor.base_model.device)
    with _eval_mode(predictor):
        begin = perf_counter()
        decoded = DECODERS[decoder](predictor, prompt_ids, settings, receive)
        seconds = perf_counter() - begin
    write(detokenizer.flush())
    return Generation(
        token_ids=decoded.token_ids,
        num_calls=decoded.num_calls,
        finished=decoded.finished,
        correct_per_cycle=decoded.correct_per_cycle,
        prompt=prompt if isinstance(prompt, str) else _text(tokenizer, token_ids),
        text="".join(pieces),
        seconds=seconds,
    )


def encode_prompt(
    predictor: ParallelTokenPredictor,
    prompt: str | Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts in front of a text.

    Raises:
        ValueError: it is empty, too long for `max_new_tokens` more, or has a token the model does not know.
    """
    token_ids = tokenizer.encode(prompt, verbose=False) if isinstance(prompt, str) else list(prompt)
    require_room(predictor, len(token_ids), settings)
    vocabulary = predictor.base_model.config.vocab_size
    if unknown := [token_id for token_id in token_ids if not 0 <= token_id < vocabulary]:
        raise ValueError(
            f"expected token ids in 0 .. {vocabulary - 1} (the model's vocabulary), found {unknown[0]} in the prompt"
        )
    return token_ids


def end_of_text_ids(predictor: ParallelTokenPredictor, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens after which a text ends: those of the model's generation settings, and the tokenizer's."""
    of_model: int | list[int] | None = getattr(predictor.base_model.generation_config, "eos_token_id", None)
    of_tokenizer: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    ids = of_model if isinstance(of_model, list) else [of_model]
    return frozenset(token_id for token_id in (*ids, of_tokenizer) if token_id is not None)


class IncrementalDetokenizer:
    """Token ids to text, piece by piece, in whole characters: bytes of an unfinished character wait for its rest.

    Args:
        tokenizer: of the text.
        prompt_ids: tokens before the text; they settle whether it begins with a blank.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._before = prompt_ids[-NUM_PROMPT_TOKENS_BEFORE:]  # written already
        self._pending: list[int] = []

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._pending += token_ids
        piece = self._piece()
        return "" if piece.endswith(INCOMPLETE) else self._written(piece)

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        return self._written(self._piece())

    def _piece(self) -> str:
        before, both = (_text(self._tokenizer, ids) for ids in (self._before, self._before + self._pending))
        return both[len(before) :]

    def _written(self, piece: str) -> str:
        if piece:
            self._before, self._pending = self._pending, []
        return piece


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list only for a batch
    return text


@contextmanager
def _eval_mode(predictor: ParallelTokenPredictor) -> Iterator[None]:
    """Dropout off inside the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in predictor.modules()]
    predictor.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
