"""BatchContext: what a predictor has read of several texts, and how it looks ahead of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ptp_lightning.decoding.batch_invariance import batch_invariant
from ptp_lightning.decoding.generation import GenerationSettings, OnTokens, VerifiedTexts, require_prompts
from ptp_lightning.decoding.lookahead import Lookahead, place
from ptp_lightning.decoding.packed_linear import pack_linear_layers
from ptp_lightning.decoding.ragged_cache import RaggedCache
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.models.refiner.refiner import RefinerContext


class BatchContext:
    """The base model and the tokens of B texts that it has read, and the same of a student's copy and of the refiner.

    Slots share the base model's call if they run in the same network. A copy has its own call for them, in which it
    first reads the tokens that it has not read yet.

    Args:
        predictor: the network.
        settings: sampling and auxiliaries of the texts.
        prompt_lengths: of the rows, whose tokens are still to be read.
        timer: is told when a phase ends.

    Attributes:
        sampling: the same, with the predictor's token order.
        timer: the stopwatch.
        num_calls: forward passes so far, those of a student's copy included.
    """

    def __init__(
        self,
        predictor: PredictorNetwork,
        settings: GenerationSettings,
        prompt_lengths: Sequence[int],
        timer: PhaseTimer | None = None,
    ) -> None:
        pack_linear_layers(predictor)
        self.predictor = predictor
        self.timer = PhaseTimer() if timer is None else timer
        self.sampling = predictor.sampler(settings.sampling)
        self.num_calls = 0
        num_rows = len(prompt_lengths)
        self._auxiliaries = settings.auxiliaries(num_rows, predictor.base_model.device)
        self._prompt_lengths = list(prompt_lengths)
        capacity = max(prompt_lengths) + settings.max_new_tokens + settings.window_length + settings.slot_budget
        self._cache = RaggedCache(num_rows, capacity)
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None  # tokens, their hidden states and embeddings
        refiner = predictor.refiner
        self._pairs = None if refiner is None else _Pairs(predictor, num_rows, capacity)
        self._copy = None if predictor.student_copy is None else _Copy(predictor, num_rows, capacity)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._auxiliaries.device

    def auxiliaries(self, starts: Sequence[int], length: int) -> Tensor:
        """`[B, length]`: u of the new tokens from `starts[b]` on; past the end of a text any number will do."""
        index = torch.tensor(starts, device=self.device).unsqueeze(1) + torch.arange(length, device=self.device)
        return self._of_new_tokens(index)

    def read(self, token_ids: Tensor, lookahead: Lookahead | None = None) -> tuple[Tensor, Tensor]:
        """Run the network over tokens behind each row, and over slots that look ahead of them.

        Nothing of it stays unless `keep` says so. It is one call, or two where a copy of the base model runs the slots.

        Args:
            token_ids: `[B, T]`, T >= 1; what stands behind a row's own tokens only fills it up.
            lookahead: of S slots.

        Returns:
            Last hidden states of the tokens `[B, T, H]`, the base model's own, and of the slots `[B, S, H]`.
        """
        predictor, num_tokens = self.predictor, token_ids.shape[1]
        embeddings = predictor.embed(token_ids)
        if lookahead is not None and lookahead.anchors.shape[1] == 0:
            lookahead = None
        if lookahead is None or self._copy is not None:
            with predictor.gate.closed():
                tokens = self._call(embeddings, num_tokens, None)
            slots = tokens[:, :0]
            if lookahead is not None and self._copy is not None:
                slots = self._copy.look_ahead(token_ids, lookahead, self._slot_embeddings(lookahead))
                self.num_calls += 1
        else:
            ahead = self._slot_embeddings(lookahead).to(embeddings.dtype)
            num_slots = ahead.shape[1]
            with predictor.gate.open(suffix=num_slots):
                hidden = self._call(torch.cat([embeddings, ahead], dim=1), num_tokens, lookahead)
            tokens, slots = hidden.split([num_tokens, num_slots], dim=1)
        self._latest = (token_ids, tokens, embeddings)
        return tokens, slots

    def logits(self, hidden: Tensor) -> Tensor:
        """The base model's `[..., V]` of hidden states `[..., H]` of tokens, whatever others it gets beside them."""
        with batch_invariant(self.predictor.base_model):
            return self.predictor.logits(hidden)

    def keep(self, counts: Sequence[int]) -> None:
        """Of the tokens of the latest `read`, the first `counts[b]` of row b become part of its text."""
        assert self._latest is not None, "nothing was read"
        token_ids, hidden, embeddings = self._latest
        self._latest = None
        self._cache.keep(counts)
        if self._pairs is not None:
            self._pairs.note(hidden, embeddings, counts)
        if self._copy is not None:
            self._copy.keep(token_ids, counts)

    def refine(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Slots that follow the kept tokens, refined; no call of the network, and no trace in the context.

        Args:
            hidden: `[B, J, H]`, last hidden states of slots.
            token_ids: `[B, J]`, the tokens that they stand for.

        Returns:
            `[B, J, H]`.
        """
        assert self._pairs is not None, "checked by predictor.num_refinement_steps"
        told = self.predictor.refiner_conditioning(self.sampling.settings)
        return self._pairs.refine(hidden, self.predictor.embed_draft(token_ids), told)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        index = torch.tensor(rows, device=self.device)
        self._auxiliaries = self._auxiliaries[index]
        self._prompt_lengths = [self._prompt_lengths[row] for row in rows]
        self._cache.select(rows)
        for part in (self._pairs, self._copy):
            if part is not None:
                part.select(rows)

    def _slot_embeddings(self, lookahead: Lookahead) -> Tensor:
        """Input embeddings `[B, S, H]` of the slots of a call."""
        before = [length - prompt for length, prompt in zip(self._cache.lengths, self._prompt_lengths, strict=True)]
        stand_for = torch.tensor(before, device=self.device).unsqueeze(1) + lookahead.anchors + 1 + lookahead.offsets
        pairs = torch.stack([self._of_new_tokens(stand_for), self._of_new_tokens(stand_for + 1)], dim=-1)
        return self.predictor.embed_slots(pairs, self.sampling.settings).squeeze(2)

    def _of_new_tokens(self, index: Tensor) -> Tensor:
        return self._auxiliaries.gather(1, index.clamp(0, self._auxiliaries.shape[1] - 1))

    def _call(self, embeddings: Tensor, num_tokens: int, lookahead: Lookahead | None) -> Tensor:
        self.num_calls += 1
        position_ids, mask = place_within(self.predictor, self._cache.lengths, num_tokens, lookahead, self.device)
        with batch_invariant(self.predictor.base_model):
            return self.predictor.run_decoder(embeddings, position_ids, mask, self._cache)


class _Copy:
    """A student's copy of the base model, and the tokens it has read; it reads when slots are asked for.

    Args:
        predictor: whose student is a copy.
        num_rows: B.
        capacity: see `RaggedCache`.
    """

    def __init__(self, predictor: PredictorNetwork, num_rows: int, capacity: int) -> None:
        self._predictor = predictor
        self._cache = RaggedCache(num_rows, capacity)
        self._unread: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self._has_read = False

    def look_ahead(self, token_ids: Tensor, lookahead: Lookahead, slots: Tensor) -> Tensor:
        """One call that reads what is unread, then the tokens `[B, T]` of the base model's call, then slots.

        Args:
            token_ids: `[B, T]`.
            lookahead: of S slots behind them.
            slots: `[B, S, H]`, input embeddings.

        Returns:
            Last hidden states of the slots `[B, S, H]`, for `slot_logits`.
        """
        unread = [sum(map(len, parts)) for parts in self._unread]
        rows = [torch.cat([*parts, row]) for parts, row in zip(self._unread, token_ids, strict=True)]
        tokens = self._predictor.student_embed(pad_sequence(rows, batch_first=True))
        shift = torch.tensor(unread, device=token_ids.device).unsqueeze(1)
        anchors = torch.where(lookahead.anchors < 0, -1, lookahead.anchors + shift)
        position_ids, mask = place_within(
            self._predictor, self._cache.lengths, tokens.shape[1], lookahead._replace(anchors=anchors), tokens.device
        )
        embeddings = torch.cat([tokens, slots.to(tokens.dtype)], dim=1)
        hidden = self._predictor.run_student_decoder(embeddings, position_ids, mask, self._cache)
        self._cache.keep(unread)
        self._unread = [[] for _ in unread]
        self._has_read = True
        return hidden[:, tokens.shape[1] :]

    def keep(self, token_ids: Tensor, counts: Sequence[int]) -> None:
        """See `BatchContext.keep`: they stay here too if they were read here."""
        if self._has_read:
            self._cache.keep(counts)
        else:
            for parts, row, count in zip(self._unread, token_ids, counts, strict=True):
                parts.append(row[:count])
        self._has_read = False

    def select(self, rows: Sequence[int]) -> None:
        """See `BatchContext.select`."""
        self._cache.select(rows)
        self._unread = [self._unread[row] for row in rows]


class _Pairs:
    """What the refiner has read of the texts; it reads when a draft is refined.

    Args:
        predictor: that has a refiner.
        num_rows: B.
        capacity: see `RaggedCache`.
    """

    def __init__(self, predictor: PredictorNetwork, num_rows: int, capacity: int) -> None:
        assert predictor.refiner is not None
        self._predictor = predictor
        self._caches = (RaggedCache(num_rows, capacity), RaggedCache(num_rows, capacity))
        self._refiner = RefinerContext(predictor.refiner, predictor.lower_layers, self._caches)
        self._unread: list[tuple[Tensor, Tensor, list[int]]] = []

    def note(self, hidden: Tensor, embeddings: Tensor, counts: Sequence[int]) -> None:
        """Of tokens with these last hidden states and embeddings, `[B, T, H]` each, keep `counts[b]` in row b."""
        longest = max(counts)
        if longest:
            self._unread.append((hidden[:, :longest], embeddings[:, :longest], list(counts)))

    def refine(self, hidden: Tensor, embeddings: Tensor, told: Tensor | None) -> Tensor:
        """See `BatchContext.refine`."""
        if not self._unread:
            return self._refiner.refine(hidden, embeddings, *self._place(hidden.shape[1]), told)
        *earlier, latest = self._unread
        self._unread = []
        for unread, unread_embeddings, counts in earlier:
            self._refiner.read(unread, unread_embeddings, *self._place(unread.shape[1]))
            self._keep(counts)
        # What was read last goes along with the slots, which saves a pass.
        unread, unread_embeddings, counts = latest
        num_tokens, num_slots = unread.shape[1], hidden.shape[1]
        refined = self._refiner.refine(
            torch.cat([unread, hidden], dim=1),
            torch.cat([unread_embeddings, embeddings], dim=1),
            *self._place(num_tokens, Lookahead.single(counts, num_slots, hidden.device)),
            None if told is None else pad(told.expand(num_slots, -1), (0, 0, num_tokens, 0)),
        )
        self._keep(counts)
        return refined[:, num_tokens:]

    def select(self, rows: Sequence[int]) -> None:
        """See `BatchContext.select`."""
        for cache in self._caches:
            cache.select(rows)
        self._unread = [
            (hidden[list(rows)], embeddings[list(rows)], [counts[row] for row in rows])
            for hidden, embeddings, counts in self._unread
        ]

    def _keep(self, counts: Sequence[int]) -> None:
        for cache in self._caches:
            cache.keep(counts)

    def _place(self, num_tokens: int, lookahead: Lookahead | None = None) -> tuple[Tensor, Tensor]:
        device = self._predictor.base_model.device
        return place_within(self._predictor, self._caches[0].lengths, num_tokens, lookahead, device)


def place_within(
    predictor: PredictorNetwork,
    lengths: Sequence[int],
    num_tokens: int,
    lookahead: Lookahead | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """See `place`; what stands behind the last position of the model, to be thrown away, shares that position."""
    position_ids, mask = place(lengths, num_tokens, lookahead, device)
    limit = predictor.max_positions
    return position_ids if limit is None else position_ids.clamp_max(limit - 1), mask


def begin(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_tokens: OnTokens | None,
    timer: PhaseTimer | None,
) -> tuple[BatchContext, VerifiedTexts, Tensor, list[int]]:
    """What all decoders begin with.

    Returns:
        A context that has read nothing, texts without a token, and what is to be read first: the prompts, filled up to
        `[B, S]`, and how long each is.

    Raises:
        ValueError: there is no prompt, or one is empty or too long for `max_new_tokens` more.
    """
    require_prompts(predictor, prompts, settings)
    counts = [len(prompt) for prompt in prompts]
    context = BatchContext(predictor, settings, counts, timer)
    filled = [[*prompt, *[0] * (max(counts) - len(prompt))] for prompt in prompts]
    texts = VerifiedTexts(settings, len(prompts), on_tokens)
    return context, texts, torch.tensor(filled, device=context.device), counts


def columns_from(states: Tensor, firsts: Sequence[int], length: int) -> Tensor:
    """`[B, T, H]` from column `firsts[b]` on: `[B, length, H]`; past the end, the last column again."""
    columns = torch.tensor(firsts, device=states.device).unsqueeze(1) + torch.arange(length, device=states.device)
    index = columns.clamp_max(states.shape[1] - 1)
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[2]))
