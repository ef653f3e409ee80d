"""What all decoders share: settings, auxiliaries by position, the verified texts, and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries
from ptp_lightning.models.config import MAX_SLOTS
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.randomness import keyed_generator
from ptp_lightning.utils.whole_numbers import one_or_several, whole_number

FinishReason = Literal["eos", "stop", "length"]
OnTokens = Callable[[int, list[int]], int | None]
"""Is called with the index of a prompt and new tokens of its text. To end the text it returns how many of these tokens
belong to it. The end must depend on the tokens alone, not on how many arrive at a time."""


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a text and of its drafts.

    Args:
        sampling: how the base model's distributions Q are made from its logits.
        max_new_tokens: the text ends after this many tokens, or earlier at an end-of-text token.
        seed: of the auxiliaries; a tuple holds one for each prompt of a batch.
        end_of_text: token ids that end the text; such a token is the last one of the text.
        window_length: L, tokens drafted per cycle. It may differ from training and does not change the text.
        slot_budget: slots of a call of partial quadratic decoding in all branches. It does not change the text.
        num_draft_tokens: drafted tokens that a cycle of speculative decoding verifies besides the exact first one: the
            likeliest of a `TokenTree`, at most `window_length - 1` after each other. 0 is a single draft; None leaves
            it to `num_tree_tokens`. It does not change the text.

    Raises:
        ValueError: a value is out of range, or no integer where one is needed; names the key.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = 64
    seed: int | tuple[int, ...] = 0
    end_of_text: frozenset[int] = frozenset()
    window_length: int = 16
    slot_budget: int = 16
    num_draft_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "window_length", "slot_budget", "num_draft_tokens"):
            if name != "num_draft_tokens" or self.num_draft_tokens is not None:
                object.__setattr__(self, name, whole_number(getattr(self, name), name))
        object.__setattr__(self, "seed", one_or_several(self.seed, "seed"))
        for name, least in (("max_new_tokens", 1), ("slot_budget", 1), ("num_draft_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"expected {name} >= {least}, found {value}")
        if self.window_length < 2:
            raise ValueError(
                f"expected window_length >= 2 (the first token of a window needs no slot), found {self.window_length}"
            )
        for name in ("window_length", "slot_budget", "num_draft_tokens"):  # memory is allocated for them at once
            if (getattr(self, name) or 0) > MAX_SLOTS:
                raise ValueError(f"expected {name} <= {MAX_SLOTS}, found {getattr(self, name)}")

    def auxiliaries(self, num_texts: int, device: torch.device) -> Tensor:
        """`[num_texts, max_new_tokens]` float64: u_k picks the k-th new token of a text, in every decoder.

        Raises:
            ValueError: there are several seeds, but not one for each text.
        """
        seeds = (self.seed,) * num_texts if isinstance(self.seed, int) else self.seed
        if len(seeds) != num_texts:
            raise ValueError(f"expected a seed, or one for each of {num_texts} prompts, found {len(seeds)}: set seed")
        shape = (self.max_new_tokens,)
        return torch.stack([draw_auxiliaries(shape, keyed_generator(seed, "generate"), device) for seed in seeds])


class Cycle(NamedTuple):
    """What a decoder drafts, verifies and commits together: two or three calls, or a single one.

    Attributes:
        num_committed: new tokens of the text.
        num_calls: forward passes, see `Decoded.num_calls`.
        num_correct: correct tokens of the draft, 1 .. L, including its exact first token; 0 without a draft.
        num_drafted: tokens of the draft, including its exact first token; 0 without a draft.
        rejected: tokens of the draft after the correct ones; none in the cycle that ends the text early.
    """

    num_committed: int
    num_calls: int
    num_correct: int = 0
    num_drafted: int = 0
    rejected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decoded:
    """What a decoder returns.

    Attributes:
        token_ids: the new tokens, an end-of-text token included.
        num_calls: forward passes of the base model that this text took part in, including those of a student that is a
            network of its own. The reading of the prompt is part of the first, also if it is a pass of its own.
        finish_reason: "eos" after an end-of-text token, "stop" after a stop string or where `on_tokens` ended the text,
            "length" after `max_new_tokens`.
        cycles: in the order of the text, whose tokens they divide among them.
    """

    token_ids: list[int]
    num_calls: int
    finish_reason: FinishReason
    cycles: list[Cycle]

    @property
    def correct_per_cycle(self) -> list[int]:
        """Number of correct tokens of each draft, see `Cycle`; empty without drafts."""
        return [cycle.num_correct for cycle in self.cycles if cycle.num_drafted]

    @property
    def drafted_per_cycle(self) -> list[int]:
        """Number of tokens of each draft, see `Cycle`."""
        return [cycle.num_drafted for cycle in self.cycles if cycle.num_drafted]

    @property
    def committed_per_cycle(self) -> list[int]:
        """Number of tokens that each cycle with a draft added to the text."""
        return [cycle.num_committed for cycle in self.cycles if cycle.num_drafted]


@dataclass(frozen=True)
class Generation(Decoded):
    """A continuation as text, with its cost.

    Attributes:
        prompt: the text that is continued.
        text: the continuation, without special tokens.
        seconds: wall-clock time from the tokenised prompt to the last token; for a batch, of all its texts together.
    """

    prompt: str
    text: str
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Number of new tokens, including an end-of-text token."""
        return len(self.token_ids)

    @property
    def accepted_per_call(self) -> float:
        """New tokens per forward pass; 1 for the autoregressive decoder."""
        return self.num_tokens / self.num_calls


class VerifiedTexts:
    """The new tokens of several texts so far; all of them are the base model's own picks.

    Args:
        settings: say when a text ends.
        num_prompts: number of texts.
        on_tokens: is called with the tokens of every commit.

    Attributes:
        rows: indices of the texts that are not finished, in the order of the batch.

    >>> texts = VerifiedTexts(GenerationSettings(max_new_tokens=3), num_prompts=2, on_tokens=None)
    >>> texts.commit([[5, 6, 7, 8], [5, 6]], num_calls=1)
    >>> texts.drop_finished(), texts.rows, texts.remaining
    ([1], [1], [1])
    """

    def __init__(self, settings: GenerationSettings, num_prompts: int, on_tokens: OnTokens | None) -> None:
        self.rows = list(range(num_prompts))
        self._token_ids: list[list[int]] = [[] for _ in self.rows]
        self._finish_reasons: list[FinishReason | None] = [None] * num_prompts
        self._num_calls = [0] * num_prompts
        self._cycles: list[list[Cycle]] = [[] for _ in self.rows]
        self._settings = settings
        self._on_tokens = on_tokens

    @property
    def new_tokens(self) -> list[list[int]]:
        """The new tokens of each unfinished text; not to be changed."""
        return [self._token_ids[row] for row in self.rows]

    @property
    def starts(self) -> list[int]:
        """Number of new tokens of each unfinished text."""
        return [len(self._token_ids[row]) for row in self.rows]

    @property
    def remaining(self) -> list[int]:
        """Number of tokens that may still follow in each unfinished text."""
        return [self._settings.max_new_tokens - start for start in self.starts]

    def commit(
        self,
        new: Sequence[list[int]],
        num_calls: int,
        correct: Sequence[int] | None = None,
        drafted: Sequence[int] | None = None,
        rejected: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Append verified tokens to each unfinished text: at most `remaining`, and up to the first that ends it.

        Args:
            new: token ids for each of `rows`.
            num_calls: forward passes that it took.
            correct: number of correct tokens of each draft; None if there was no draft.
            drafted: number of tokens of each draft; given with `correct`.
            rejected: tokens of each draft after the correct ones; by default none.
        """
        for index, (row, token_ids) in enumerate(zip(self.rows, new, strict=True)):
            num_committed = self._commit(row, token_ids)
            self._num_calls[row] += num_calls
            cycle = Cycle(num_committed, num_calls)
            if correct is not None and drafted is not None:
                wrong = rejected[index] if rejected is not None and num_committed == len(token_ids) else ()
                cycle = Cycle(
                    num_committed, num_calls, min(correct[index], num_committed), drafted[index], tuple(wrong)
                )
            self._cycles[row].append(cycle)

    def _commit(self, row: int, token_ids: list[int]) -> int:
        text = self._token_ids[row]
        token_ids = token_ids[: self._settings.max_new_tokens - len(text)]
        end = next((k for k, token_id in enumerate(token_ids) if token_id in self._settings.end_of_text), None)
        if end is not None:
            token_ids, self._finish_reasons[row] = token_ids[: end + 1], "eos"
        kept = None if self._on_tokens is None else self._on_tokens(row, token_ids)
        if kept is not None:
            token_ids, self._finish_reasons[row] = token_ids[:kept], "stop"
        text += token_ids
        if self._finish_reasons[row] is None and len(text) == self._settings.max_new_tokens:
            self._finish_reasons[row] = "length"
        return len(token_ids)

    def drop_finished(self) -> list[int] | None:
        """Drop finished texts from `rows`; returns the indices into `rows` that are left, or None if all are."""
        unfinished = [index for index, row in enumerate(self.rows) if self._finish_reasons[row] is None]
        if len(unfinished) == len(self.rows):
            return None
        self.rows = [self.rows[index] for index in unfinished]
        return unfinished

    def decoded(self) -> list[Decoded]:
        """The texts, all of them finished."""
        parts = zip(
            self._token_ids,
            self._num_calls,
            self._finish_reasons,
            self._cycles,
            strict=True,
        )
        return [
            Decoded(token_ids, num_calls, _not_none(finish_reason), cycles)
            for token_ids, num_calls, finish_reason, cycles in parts
        ]


def _not_none(finish_reason: FinishReason | None) -> FinishReason:
    assert finish_reason is not None, "the text is not finished"
    return finish_reason


def require_prompts(
    predictor: PredictorNetwork, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> None:
    """Refuse an empty list of prompts, and prompts that `require_room` refuses.

    Raises:
        ValueError: names what to change.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, found none: set prompts")
    for prompt in prompts:
        require_room(predictor, len(prompt), settings)


def require_room(predictor: PredictorNetwork, prompt_length: int, settings: GenerationSettings) -> None:
    """Refuse a prompt without tokens, or one after which the base model has no `max_new_tokens` positions left.

    Raises:
        ValueError: names what to change.
    """
    if prompt_length == 0:
        raise ValueError("expected a prompt of at least one token, found an empty one: set prompt")
    limit = predictor.max_positions
    if limit is not None and prompt_length + settings.max_new_tokens > limit:
        raise ValueError(
            f"expected prompt + max_new_tokens <= {limit} tokens (the base model's positions), found {prompt_length} + "
            f"{settings.max_new_tokens}: lower max_new_tokens or shorten the prompt"
        )
