"""BatchContext: the texts that a predictor has read so far, and its calls that read on and look ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ptp_lightning.decoding.batch_invariance import batch_invariant
from ptp_lightning.decoding.exclusive import exclusive
from ptp_lightning.decoding.generation import GenerationSettings, OnTokens, VerifiedTexts, require_prompts
from ptp_lightning.decoding.joined_decoder import JoinedDecoder
from ptp_lightning.decoding.lookahead import Lookahead, positions_and_mask
from ptp_lightning.decoding.prefix_penalties import PrefixPenalties
from ptp_lightning.decoding.preparation import prepare_for_decoding
from ptp_lightning.decoding.ragged_cache import RaggedCache
from ptp_lightning.decoding.refiner_pairs import RefinerPairs
from ptp_lightning.decoding.student_copy import StudentCopy
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.decoding.token_tree import TokenTree
from ptp_lightning.models.correction.correction import CorrectionHead
from ptp_lightning.models.network import PredictorNetwork

MIN_PREFILL_TOKENS = 48
"""A shorter prompt is read by the first call: the separate call for its last token costs as much as one piece saves."""


class BatchContext:
    """B texts as the networks of a predictor have read them: the base model, a student's copy of it, and a `Refiner`.

    Slots share the base model's call if they run in the same network. A copy has its own call for them, in which it
    first reads the tokens that it has not read yet. Slots that run through the last layers alone, or through none,
    have a pass of their own, `late_slots`.

    Args:
        predictor: the network, inside `prepare_for_decoding`.
        settings: sampling settings and seeds of the texts.
        prompt_lengths: number of prompt tokens of each row; none of them has been read.
        timer: marks the ends of phases; by default one that nobody reads.

    Attributes:
        sampling: sampling settings with the predictor's token order.
        timer: see above.
        num_calls: forward passes so far, including those of a student's copy, without those of `late_slots`.
    """

    def __init__(
        self,
        predictor: PredictorNetwork,
        settings: GenerationSettings,
        prompt_lengths: Sequence[int],
        timer: PhaseTimer | None = None,
    ) -> None:
        self.predictor = predictor
        self.timer = PhaseTimer() if timer is None else timer
        self.sampling = predictor.sampler(settings.sampling)
        self.num_calls = 0
        num_rows = len(prompt_lengths)
        self._auxiliaries = settings.auxiliaries(num_rows, predictor.base_model.device)
        self._prompt_lengths = list(prompt_lengths)
        capacity = max(prompt_lengths) + settings.max_new_tokens + settings.window_length + settings.slot_budget
        capacity += settings.num_draft_tokens or 0
        self._cache = RaggedCache(num_rows, capacity)
        self._latest: _LatestCall | None = None
        self._joined = (
            JoinedDecoder(predictor.base_model, predictor.packed_weights, predictor.first_slot_layer)
            if JoinedDecoder.is_supported(predictor.base_model)
            else None
        )
        refiner = predictor.refiner
        self._refiner = None if refiner is None else RefinerPairs(predictor, refiner, num_rows, capacity)
        self._copy = None if predictor.student_copy is None else StudentCopy(predictor, num_rows, capacity)
        self._last: _LastTokens | None = None
        self._penalties = PrefixPenalties.of(settings.sampling, num_rows, self.device)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._auxiliaries.device

    def auxiliaries(self, starts: Sequence[int], length: int) -> Tensor:
        """`[B, length]`: u of the new tokens `starts[b]`, `starts[b] + 1`, ..; any number after the end of a text."""
        index = torch.tensor(starts, device=self.device).unsqueeze(1) + torch.arange(length, device=self.device)
        return self._auxiliaries_at(index)

    def read_tree(self, tree: TokenTree) -> None:
        """Run the base model on drafted tokens that follow each row; `keep_path` keeps some of them."""
        if tree.is_chain:
            self.read(tree.token_ids)
            return
        embeddings = self.predictor.embed(tree.token_ids)
        hidden, _, entry = self._call(embeddings, embeddings[:, :0], None, tree)
        self._latest = _LatestCall(tree.token_ids, hidden, embeddings, entry, is_tree=True)

    def read(self, token_ids: Tensor, lookahead: Lookahead | None = None) -> tuple[Tensor, Tensor]:
        """Run the network on tokens that follow each row, and on slots that look ahead of them.

        The next call overwrites what this one read, unless `keep` keeps it. It is one forward pass, or two where a copy
        of the base model runs the slots.

        Args:
            token_ids: `[B, T]`, T >= 1; rows with fewer tokens are padded on the right.
            lookahead: of S slots; none if slots run through the last layers alone.

        Returns:
            Last hidden states of the tokens `[B, T, H]`, the base model's own, and of the slots `[B, S, H]`.
        """
        embeddings = self.predictor.embed(token_ids)
        if lookahead is not None and lookahead.anchors.shape[1] == 0:
            lookahead = None
        assert lookahead is None or not self.predictor.first_slot_layer, "such slots have a pass of their own"
        own = lookahead if self._copy is None else None  # of the base model's call
        slots = embeddings[:, :0] if own is None else self._slot_embeddings(own).to(embeddings.dtype)
        tokens, slots, entry = self._call(embeddings, slots, own)
        if lookahead is not None and self._copy is not None:
            slots = self._copy.look_ahead(token_ids, lookahead, self._slot_embeddings(lookahead))
            self.num_calls += 1
        self._latest = _LatestCall(token_ids, tokens, embeddings, entry)
        return tokens, slots

    def late_slots(self, first: Tensor, num_slots: int) -> Tensor:
        """Run slots through the last layers of the base model alone, or none, after the kept tokens of each row.

        Args:
            first: `[B, 1]`, the base model's token after them, which is not read yet.
            num_slots: J.

        Returns:
            Last hidden states `[B, J, H]` of slots that stand for the first token and the tokens after it.
        """
        assert self._last is not None, "nothing was kept"
        predictor = self.predictor
        lookahead = Lookahead.single([0] * len(first), num_slots, self.device)
        slots, of_window = self._slot_embeddings(lookahead), (self._last.hidden, first.squeeze(1))
        if self._last.entry_hidden is None:
            return predictor.layerless_slots(slots, *of_window).to(predictor.base_model.dtype)
        slots = predictor.enter_late(slots, self._last.entry_hidden, *of_window).to(predictor.base_model.dtype)
        lengths, limit = self._cache.lengths, predictor.max_positions
        position_ids, mask = positions_and_mask(lengths, 0, lookahead, self.device, limit)
        if self._joined is not None:
            return self._joined.run_late_slots(slots, position_ids, mask, self._cache)
        with predictor.gate.open(), batch_invariant(predictor.base_model):
            return predictor.run_slot_layers(slots, position_ids, mask, self._cache)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Read all tokens but the last of long prompts, each alone and in one piece, if the base model allows it.

        Calls of few tokens are slow for many, because their results must not depend on the number of rows.

        Args:
            prompts: of all rows, which have no tokens yet.

        Returns:
            How many tokens of each were read; they are kept.
        """
        if self._joined is None:
            return [0] * len(prompts)
        counts = [len(prompt) - 1 if len(prompt) >= MIN_PREFILL_TOKENS else 0 for prompt in prompts]
        if any(counts):
            token_ids = _padded([prompt[:count] for prompt, count in zip(prompts, counts, strict=True)], self.device)
            embeddings = self.predictor.embed(token_ids)
            hidden = torch.zeros_like(embeddings)
            entry = None if self.predictor.slot_encoder.late_entry is None else hidden.clone()
            for row, count in enumerate(counts):
                if count:
                    hidden[row, :count] = self._joined.prefill(embeddings[row, :count], row, self._cache)
                    if entry is not None and self._joined.entry_hidden is not None:
                        entry[row, :count] = self._joined.entry_hidden
            self._latest = _LatestCall(token_ids, hidden, embeddings, entry)
            self.keep(counts)
        return counts

    def logits(self, hidden: Tensor) -> Tensor:
        """The base model's logits `[..., V]` for hidden states `[..., H]` of tokens; batch-invariant."""
        with batch_invariant(self.predictor.base_model):
            return self.predictor.logits(hidden)

    def next_logits(self, first_columns: Sequence[int], length: int) -> Tensor:
        """The base model's logits after tokens of the latest `read`, with the penalties of the tokens before.

        Args:
            first_columns: the column of each row after which the first token follows.
            length: J, number of columns; those after the end are the last column again.

        Returns:
            `[B, J, V]`, of the tokens that follow columns `first_columns[b]`, `first_columns[b] + 1`, ..
        """
        assert self._latest is not None, "nothing was read"
        logits = self.logits(take_columns(self._latest.hidden, first_columns, length))
        if self._penalties is None:
            return logits
        return self._penalties.penalized(logits, self._latest.token_ids, first_columns)

    def penalized_slots(self, logits: Tensor, first: Tensor) -> Tensor:
        """Slot logits `[B, J, N]` with the penalty of the kept tokens and of the first token `[B, 1]` of the draft."""
        if self._penalties is None:
            return logits
        vocabulary = self.sampling.draft_vocabulary
        return self._penalties.penalized_slots(logits, first, None if vocabulary is None else vocabulary.token_ids)

    def keep(self, counts: Sequence[int]) -> None:
        """Append the first `counts[b]` tokens of the latest `read` to the text of row b."""
        assert self._latest is not None, "nothing was read"
        latest, self._latest = self._latest, None
        self._cache.keep(counts)
        if self.predictor.first_slot_layer:
            ends = [max(count - 1, 0) for count in counts]
            hidden, entry_hidden = (
                None if one is None else take_columns(one, ends, 1).squeeze(1)
                for one in (latest.hidden, latest.entry_hidden)
            )
            assert hidden is not None, "every call has them"
            self._last = _LastTokens(hidden, entry_hidden)
        if self._refiner is not None:
            self._refiner.append(latest.hidden, latest.embeddings, counts)
        if self._copy is not None:
            self._copy.keep(latest.token_ids, counts)
        if self._penalties is not None:
            self._penalties.keep(latest.token_ids, counts)

    def keep_path(self, columns: Sequence[Sequence[int]]) -> None:
        """Append a path of the latest `read_tree` to the text of each row.

        Args:
            columns: of its tokens, in their order.
        """
        assert self._latest is not None, "nothing was read"
        if self._latest.is_tree:
            if self._joined is None:
                self._cache.move(columns)
            else:
                self._joined.write_path(columns)
            longest = max(map(len, columns))
            index = torch.tensor([[*path, *[0] * (longest - len(path))] for path in columns], device=self.device)
            self._latest = self._latest.gathered(index)
        self.keep([len(path) for path in columns])

    def correct(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Correct slots that follow the kept tokens, all in parallel; without a call of the network.

        Args:
            hidden: `[B, J, H]`, last hidden states of slots.
            token_ids: `[B, J]`, the tokens that they stand for.

        Returns:
            `[B, J, H]` or `[B, J, H + F]`, for `slot_logits`.
        """
        embeddings = self.predictor.embed_draft(token_ids)
        if self._refiner is None:
            assert isinstance(self.predictor.correction, CorrectionHead), "checked by predictor.num_refinement_steps"
            return self.predictor.correction(hidden, embeddings)
        return self._refiner.refine(hidden, embeddings, self.predictor.refiner_conditioning(self.sampling.settings))

    def select(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and put these in this order."""
        index = torch.tensor(rows, device=self.device)
        self._auxiliaries = self._auxiliaries[index]
        self._prompt_lengths = [self._prompt_lengths[row] for row in rows]
        self._cache.select(rows)
        if self._last is not None:
            hidden, entry_hidden = self._last
            self._last = _LastTokens(hidden[index], None if entry_hidden is None else entry_hidden[index])
        for part in (self._refiner, self._copy, self._penalties):
            if part is not None:
                part.select(rows)

    def _slot_embeddings(self, lookahead: Lookahead) -> Tensor:
        """Input embeddings `[B, S, H]` of the slots of a call."""
        num_new = [length - prompt for length, prompt in zip(self._cache.lengths, self._prompt_lengths, strict=True)]
        index = torch.tensor(num_new, device=self.device).unsqueeze(1) + lookahead.anchors + 1 + lookahead.offsets
        pairs = torch.stack([self._auxiliaries_at(index), self._auxiliaries_at(index + 1)], dim=-1)
        return self.predictor.embed_slots(pairs, self.sampling.settings).squeeze(2)

    def _auxiliaries_at(self, index: Tensor) -> Tensor:
        return self._auxiliaries.gather(1, index.clamp(0, self._auxiliaries.shape[1] - 1))

    def _call(
        self,
        tokens: Tensor,
        slots: Tensor,
        lookahead: Lookahead | None,
        tree: TokenTree | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Last hidden states of tokens `[B, T, H]` and slots `[B, S, H]`, given their input embeddings.

        The third result is what the layer reads of the tokens at which slots enter, None for the first layer.
        """
        self.num_calls += 1
        predictor, num_tokens = self.predictor, tokens.shape[1]
        lengths, limit = self._cache.lengths, predictor.max_positions
        ancestors = None if tree is None else tree.ancestors
        position_ids, mask = positions_and_mask(lengths, num_tokens, lookahead, self.device, limit, ancestors)
        if self._joined is not None:
            hidden, slots = self._joined.run(tokens, slots, position_ids, mask, self._cache, tree)
            entry = self._joined.entry_hidden
            return hidden, slots, None if entry is None else entry.view(tokens.shape)
        num_slots = slots.shape[1]
        gate = predictor.gate.open(suffix=num_slots) if num_slots else predictor.gate.closed()
        with gate, batch_invariant(predictor.base_model), predictor.recorded_entry() as entry:
            embeddings = torch.cat([tokens, slots], dim=1)
            hidden = predictor.run_decoder(embeddings, position_ids, mask, self._cache)
        return hidden[:, :num_tokens], hidden[:, num_tokens:], entry[0] if entry else None


class _LatestCall(NamedTuple):
    """Tokens `[B, T]` of a call, their last hidden states and their input embeddings `[B, T, H]`.

    `entry_hidden` is what the layer read at which slots enter, see `PredictorNetwork.recorded_entry`.
    """

    token_ids: Tensor
    hidden: Tensor
    embeddings: Tensor
    entry_hidden: Tensor | None
    is_tree: bool = False

    def gathered(self, columns: Tensor) -> _LatestCall:
        """The tokens at `[B, K]`."""
        states = columns.unsqueeze(2).expand(-1, -1, self.hidden.shape[2])
        token_ids, hidden = self.token_ids.gather(1, columns), self.hidden.gather(1, states)
        entry = None if self.entry_hidden is None else self.entry_hidden.gather(1, states)
        return _LatestCall(token_ids, hidden, self.embeddings.gather(1, states), entry)


class _LastTokens(NamedTuple):
    """Of the last kept token of each row `[B, H]`: last hidden states, and what the layer read at which slots enter."""

    hidden: Tensor
    entry_hidden: Tensor | None


class Start(NamedTuple):
    """What decoders start from.

    Attributes:
        context: has read what `prefill` reads.
        texts: without new tokens.
        unread: `[B, S]` token ids, the rest of each prompt, padded on the right.
        counts: number of these tokens of each prompt.
    """

    context: BatchContext
    texts: VerifiedTexts
    unread: Tensor
    counts: list[int]


@contextmanager
def begin_decoding(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
    timer: PhaseTimer | None = None,
) -> Iterator[Start]:
    """Check the prompts and prepare the network; at the end of the block the network is as it was.

    Other threads wait until then, see `exclusive`.

    Args:
        predictor: see `prepare_for_decoding`.
        prompts: B lists of token ids.
        settings: of the texts.
        on_tokens: is called with the tokens of every commit.
        timer: marks the ends of phases.

    Raises:
        ValueError: there is no prompt, or one is empty or too long for `max_new_tokens` more.
    """
    require_prompts(predictor, prompts, settings)
    with exclusive(predictor), prepare_for_decoding(predictor):
        context = BatchContext(predictor, settings, [len(prompt) for prompt in prompts], timer)
        texts = VerifiedTexts(settings, len(prompts), on_tokens)
        unread = [prompt[start:] for prompt, start in zip(prompts, context.prefill(prompts), strict=True)]
        yield Start(context, texts, _padded(unread, context.device), [len(token_ids) for token_ids in unread])


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids `[B, S]`, padded on the right with zeros."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def take_columns(states: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """`[B, length, H]`, the columns of `[B, T, H]` from `starts[b]` on; after the end, the last column again.

    >>> take_columns(torch.arange(8.0).view(2, 4, 1), [0, 3], 2).squeeze(-1)
    tensor([[0., 1.],
            [7., 7.]])
    """
    columns = torch.tensor(starts, device=states.device).unsqueeze(1) + torch.arange(length, device=states.device)
    index = columns.clamp_max(states.shape[1] - 1)
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[2]))
