"""What all decoders share: settings, auxiliaries by position, the cached context, the verified output, the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.models.refiner import RefinerContext
from ptp_lightning.randomness import keyed_generator
from ptp_lightning.sampling import SamplingConfig

Finished = Literal["eos", "length"]
OnTokens = Callable[[list[int]], None]


@dataclass(frozen=True)
class GenerationSettings:
    """What decides the text besides the prompt, and how long a draft may be, which does not.

    Args:
        sampling: the distribution Q of the base model that tokens are picked from.
        max_new_tokens: the text ends after this many tokens, or earlier at an end-of-text token.
        seed: of the auxiliaries.
        end_of_text: token ids that end the text; the one that does is its last token.
        window_length: L, tokens drafted per cycle; may differ from training and never changes the text.

    Raises:
        ValueError: a value is out of range; names the key.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = 64
    seed: int = 0
    end_of_text: frozenset[int] = frozenset()
    window_length: int = 16

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens >= 1, found {self.max_new_tokens}")
        if self.window_length < 2:
            raise ValueError(
                f"expected window_length >= 2 (the first token of a window needs no slot), found {self.window_length}"
            )

    def auxiliaries(self, device: torch.device) -> Tensor:
        """`[1, max_new_tokens]` float64: u_k picks the k-th new token, in every decoder."""
        return draw_auxiliaries((self.max_new_tokens,), keyed_generator(self.seed, "generate"), device).unsqueeze(0)


@dataclass(frozen=True)
class Decoded:
    """What a decoder returns.

    Attributes:
        token_ids: the new tokens, an end-of-text token included.
        num_calls: forward passes of the base model, the one that reads the prompt included, and those of the student
            where it is a network of its own.
        finished: ended by an end-of-text token, or by `max_new_tokens`.
        correct_per_cycle: correct tokens of each draft, 1 .. L, its exact first token included; empty without drafts.
    """

    token_ids: list[int]
    num_calls: int
    finished: Finished
    correct_per_cycle: list[int]


@dataclass(frozen=True)
class Generation(Decoded):
    """A continuation as text, and what it cost.

    Attributes:
        prompt: the text that is continued.
        text: the continuation, without special tokens.
        seconds: wall-clock time, from the tokenised prompt to the last token.
    """

    prompt: str
    text: str
    seconds: float

    @property
    def num_tokens(self) -> int:
        """New tokens, an end-of-text token included."""
        return len(self.token_ids)

    @property
    def accepted_per_call(self) -> float:
        """New tokens per forward pass; 1 for the autoregressive decoder."""
        return self.num_tokens / self.num_calls


class CachedContext:
    """The base model and the keys and values of the tokens it has read so far, and the same of a student's copy.

    Slots share the base model's call if they run in the same network. A copy has its own call for them, in which it
    first reads the tokens that it has not read yet: one call more in each cycle, for the first token of a window and
    the verification still come from the base model.

    Args:
        predictor: the network.
        sampling: settings of the text.

    Attributes:
        sampling: the same, with the predictor's token order.
        length: tokens in the cache; the next one read has this position id.
        num_calls: forward passes so far, those of a student's copy included.
    """

    def __init__(self, predictor: ParallelTokenPredictor, sampling: SamplingConfig) -> None:
        from transformers import DynamicCache

        self.predictor = predictor
        self.sampling = predictor.sampler(sampling)
        self.cache = DynamicCache()
        self.length = 0
        self.num_calls = 0
        # What the refiner has not read yet; it does so when a draft needs it.
        self._unrefined: list[tuple[Tensor, Tensor]] = []
        refiner = predictor.refiner
        self._pairs = None if refiner is None else RefinerContext(refiner, predictor.lower_layers)
        self._copy = None if predictor.student_copy is None else StudentContext(predictor, sampling)

    def read(self, token_ids: Tensor, auxiliaries: Tensor | None = None) -> Tensor:
        """Append tokens to the context, and look ahead through slots, which leave no trace in it.

        It is one call, or two where there are slots and the student is a copy.

        Args:
            token_ids: `[1, T]`, T >= 1.
            auxiliaries: `[1, J + 1]`, those of a window that follows the tokens, with its J slots.

        Returns:
            Last hidden states `[1, T + J, H]`; those of tokens are the base model's own.
        """
        embeddings = self.predictor.embed(token_ids)
        if auxiliaries is None or auxiliaries.shape[1] == 1:
            return self._read_tokens(token_ids, embeddings)
        if self._copy is not None:
            hidden = self._read_tokens(token_ids, embeddings)
            self.num_calls += 1
            # Of a base model in bfloat16, hidden states are widened here and rounded back before its head.
            return torch.cat([hidden, self._copy.look_ahead(auxiliaries)], dim=1)
        num_slots = auxiliaries.shape[1] - 1
        slots = self.predictor.embed_slots(auxiliaries, self.sampling.settings).to(embeddings.dtype)
        with self.predictor.gate.open(suffix=num_slots):
            hidden = self._call(torch.cat([embeddings, slots], dim=1))
        self._crop(num_slots)
        self._keep_for_refiner(hidden[:, :-num_slots], embeddings)
        return hidden

    def _read_tokens(self, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        with self.predictor.gate.closed():
            hidden = self._call(embeddings)
        self._keep_for_refiner(hidden, embeddings)
        if self._copy is not None:
            self._copy.note(token_ids)
        return hidden

    def refine(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Slots after the tokens read so far, refined; no call of the network, and no trace in the context.

        Args:
            hidden: `[1, J, H]`, last hidden states of the slots of the latest `read`.
            token_ids: `[1, J]`, the tokens that they stand for.

        Returns:
            `[1, J, H]`.
        """
        assert self._pairs is not None, "checked by predictor.refinement_rounds"
        if self._unrefined:
            unread, embeddings = (torch.cat(tensors, dim=1) for tensors in zip(*self._unrefined, strict=True))
            self._unrefined.clear()
            self._pairs.read(unread, embeddings, *_following(self._pairs.length, unread))
        embeddings = self.predictor.embed_draft(token_ids)
        told = self.predictor.refiner_told(self.sampling.settings)
        return self._pairs.refine(hidden, embeddings, *_following(self._pairs.length, hidden), told)

    def _keep_for_refiner(self, hidden: Tensor, embeddings: Tensor) -> None:
        if self._pairs is not None:
            self._unrefined.append((hidden, embeddings))

    def _call(self, embeddings: Tensor) -> Tensor:
        """One forward pass over `[1, Q, H]`, each position seeing all before it; the cache grows by Q."""
        position_ids, mask = _following(self.length, embeddings)
        hidden = self.predictor.decode(embeddings, position_ids, mask, self.cache)
        self.num_calls += 1
        self.length += embeddings.shape[1]
        return hidden

    def forget(self, num_tokens: int) -> None:
        """Cut the last tokens off, all of them of the latest `read`."""
        self._crop(num_tokens)
        if self._copy is not None:
            self._copy.forget(num_tokens)
        if self._pairs is not None and num_tokens:
            hidden, embeddings = self._unrefined.pop()
            self._keep_for_refiner(hidden[:, :-num_tokens], embeddings[:, :-num_tokens])

    def _crop(self, num_positions: int) -> None:
        self.cache.crop(-num_positions)
        self.length -= num_positions


class StudentContext:
    """A student's copy of the base model, and the keys and values of the tokens it has read so far.

    Args:
        predictor: whose student is a copy.
        sampling: settings of the text.
    """

    def __init__(self, predictor: ParallelTokenPredictor, sampling: SamplingConfig) -> None:
        from transformers import DynamicCache

        self._sampling = sampling
        self._predictor = predictor
        self._cache = DynamicCache()
        self._length = 0
        self._unread: list[Tensor] = []

    def note(self, token_ids: Tensor) -> None:
        """Append tokens `[1, T]` to the context; they are read when slots follow them."""
        self._unread.append(token_ids)

    def forget(self, num_tokens: int) -> None:
        """Cut the last tokens off, all of them of the latest `note`."""
        if num_tokens:
            self._unread.append(self._unread.pop()[:, :-num_tokens])

    def look_ahead(self, auxiliaries: Tensor) -> Tensor:
        """One call that reads what is unread, at least one token, and then slots, which leave no trace.

        Args:
            auxiliaries: `[1, J + 1]`, those of a window that follows the tokens, with its J slots.

        Returns:
            Last hidden states of the slots `[1, J, H]`, for `slot_logits`.
        """
        num_slots = auxiliaries.shape[1] - 1
        tokens = self._predictor.student_embed(torch.cat(self._unread, dim=1))
        self._unread.clear()
        slots = self._predictor.embed_slots(auxiliaries, self._sampling)
        embeddings = torch.cat([tokens, slots.to(tokens.dtype)], dim=1)
        position_ids, mask = _following(self._length, embeddings)
        hidden = self._predictor.student_decode(embeddings, position_ids, mask, self._cache)
        self._cache.crop(-num_slots)
        self._length += tokens.shape[1]
        return hidden[:, -num_slots:]


def _following(length: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """Position ids `[1, Q]` and mask `[1, 1, Q, length + Q]` of states `[1, Q, H]` that each see all before them."""
    num_queries, device = states.shape[1], states.device
    position_ids = torch.arange(length, length + num_queries, device=device).unsqueeze(0)
    mask = torch.ones(num_queries, length + num_queries, dtype=torch.bool, device=device).tril(length)
    return position_ids, mask[None, None]


class VerifiedOutput:
    """The new tokens so far, all of them the base model's own picks.

    Args:
        settings: what ends the text.
        on_tokens: is called with the tokens of every commit.
    """

    def __init__(self, settings: GenerationSettings, on_tokens: OnTokens | None) -> None:
        self.token_ids: list[int] = []
        self.finished: Finished | None = None
        self._settings = settings
        self._on_tokens = on_tokens

    @property
    def remaining(self) -> int:
        """Tokens that may still follow."""
        return self._settings.max_new_tokens - len(self.token_ids)

    def commit(self, token_ids: list[int]) -> int:
        """Append verified tokens, at most `remaining` many, up to the first that ends the text.

        Returns:
            How many were taken.
        """
        ends = (k for k, token_id in enumerate(token_ids) if token_id in self._settings.end_of_text)
        end = next(ends, None)
        if end is not None:
            token_ids, self.finished = token_ids[: end + 1], "eos"
        self.token_ids += token_ids
        if self.finished is None and self.remaining == 0:
            self.finished = "length"
        if self._on_tokens is not None:
            self._on_tokens(token_ids)
        return len(token_ids)


def require_room(predictor: ParallelTokenPredictor, prompt_length: int, settings: GenerationSettings) -> None:
    """Refuse a prompt without tokens, or one that leaves the base model no positions for `max_new_tokens`.

    Raises:
        ValueError: names what to change.
    """
    if prompt_length == 0:
        raise ValueError("expected a prompt of at least one token, found an empty one: mend prompt")
    limit = predictor.max_positions
    if limit is not None and prompt_length + settings.max_new_tokens > limit:
        raise ValueError(
            f"expected prompt + max_new_tokens <= {limit} tokens (the base model's positions), found {prompt_length} + "
            f"{settings.max_new_tokens}: lower max_new_tokens or shorten the prompt"
        )
