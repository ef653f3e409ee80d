"""Decoding in calls of a fixed shape, which a CUDA graph can replay.

The decoders of the package cannot be captured: their calls grow with the text, and the host needs the lengths. Here the
cache has its full size from the start, lengths stay on the device, and shorter drafts are padded. As in the other
decoders, the tokens that the base model picks are committed, so the text must be identical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding import GenerationSettings, StudentDrafter
from ptp_lightning.decoding.batch_invariance import batch_invariant
from ptp_lightning.decoding.lookahead import Lookahead, positions_and_mask
from ptp_lightning.decoding.ragged_cache import PreallocatedLayer
from ptp_lightning.models import PredictorNetwork

NUM_WARM_UP = 3
PADDING_AUXILIARY = 0.5  # after the end of a text; the value is irrelevant


class GraphDecoder:
    """Partial quadratic decoding of one text; without branches, autoregressive decoding.

    Args:
        predictor: in eval mode; with branches, it must have neither a correction nor a copy of the base model.
        settings: of the text.
        prompt_length: of all prompts.
        branches: slots after 0, 1, .. D correct tokens of a draft of D tokens; empty for autoregressive decoding.
        forced_draft: draft token for each position of the text, which replaces the predictor's; -1 after the end.

    Raises:
        ValueError: there are branches, and the predictor has a correction or a copy of the base model; or a branch is
            longer than a draft.
    """

    @torch.inference_mode()
    def __init__(
        self,
        predictor: PredictorNetwork,
        settings: GenerationSettings,
        prompt_length: int,
        branches: Sequence[int] = (),
        forced_draft: Tensor | None = None,
    ) -> None:
        if branches and (predictor.correction is not None or predictor.student_copy is not None):
            raise ValueError("expected a predictor with neither a correction nor a copied student, found one of them")
        draft_length = max(0, len(branches) - 1)
        if max(branches, default=0) > draft_length:
            raise ValueError(
                f"expected branches of at most {draft_length} slots, the length of a draft, found {branches}"
            )
        device = predictor.base_model.device
        self._predictor = predictor
        self._max_new_tokens = settings.max_new_tokens
        self._sampling = predictor.sampler(settings.sampling)
        self._drafter = StudentDrafter(predictor.config.objective, self._sampling)
        self._draft_length, self._num_slots = draft_length, sum(branches)
        self._lookahead = Lookahead.branches([1], [branches], device) if self._num_slots else None
        self._positions, own = positions_and_mask([0], 1 + draft_length, self._lookahead, device)
        self._own_mask = own[0, 0]  # visible keys of the call for its queries, [Q, Q]
        num_queries = len(self._own_mask)
        self._branches = torch.tensor([*branches], device=device, dtype=torch.long)
        self._branch_starts = self._branches.cumsum(0) - self._branches
        margin = 2 * num_queries  # written after the end of a text
        self._auxiliaries = pad(settings.auxiliaries(1, device), (0, margin), value=PADDING_AUXILIARY)
        self._forced_draft = None if forced_draft is None else pad(forced_draft, (0, margin), value=-1)
        self._cache = _FixedCache(prompt_length + settings.max_new_tokens + margin)
        # The state, in tensors that are modified in place.
        self._length = torch.zeros(1, dtype=torch.long, device=device)  # committed tokens in the cache
        self._start = torch.ones(1, dtype=torch.long, device=device)  # number of new tokens
        self._tokens = torch.zeros(1, 1 + draft_length, dtype=torch.long, device=device)  # the last token and a draft
        self._result = torch.zeros(
            1, 2 + draft_length, dtype=torch.long, device=device
        )  # number of correct tokens, then picks
        self._read_prompt([0] * prompt_length)
        self._replay = capture(self.call, device)

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The new tokens, and the number of calls, including the one that reads the prompt."""
        text, num_calls = [self._read_prompt(prompt)], 1
        while len(text) < self._max_new_tokens:
            self._replay()
            num_correct, *picks = self._result.tolist()[0]
            text += picks[: num_correct + 1]
            num_calls += 1
        return text[: self._max_new_tokens], num_calls

    @torch.inference_mode()
    def call_seconds(self, prompt: Sequence[int], num_calls: int, clock: Callable[[], float]) -> float:
        """Seconds per call, for several calls after a prompt; the host waits only for the last."""
        self._read_prompt(prompt)
        begin = clock()
        for _ in range(num_calls):
            self._replay()
        return (clock() - begin) / num_calls

    def call(self) -> None:
        """One call, always with the same operations: verify, run the slots, commit, draft."""
        with batch_invariant(self._predictor.base_model):
            self._call()

    def _call(self) -> None:
        predictor, num_read = self._predictor, self._tokens.shape[1]
        embeddings, position_ids, mask = predictor.embed(self._tokens), self._length + self._positions, self._mask()
        self._cache.columns = self._length + torch.arange(len(self._own_mask), device=self._length.device)
        if self._lookahead is None:
            with predictor.gate.closed():
                hidden = predictor.run_decoder(embeddings, position_ids, mask, self._cache)
        else:
            slots = self._slot_embeddings(self._lookahead).to(embeddings.dtype)
            with predictor.gate.open(suffix=self._num_slots):
                hidden = predictor.run_decoder(torch.cat([embeddings, slots], dim=1), position_ids, mask, self._cache)
        distribution = self._sampling.distribution(predictor.logits(hidden[:, :num_read]))
        picks = pick(self._auxiliaries_from(self._start, num_read), distribution)
        correct = (self._tokens[:, 1:] == picks[:, :-1]).cumprod(dim=1).sum(dim=1, keepdim=True)
        self._result.copy_(torch.cat([correct, picks], dim=1))
        self._length += 1 + correct[0]
        self._start += 1 + correct[0]
        draft = self._next_draft(hidden[:, num_read:], correct[0])
        self._tokens.copy_(torch.cat([picks.gather(1, correct), draft], dim=1))

    def _read_prompt(self, prompt: Sequence[int]) -> int:
        """Read a prompt; returns the first new token."""
        predictor, device = self._predictor, self._length.device
        token_ids = torch.tensor([list(prompt)], device=device)
        self._cache.columns = torch.arange(len(prompt), device=device)
        position_ids, own = positions_and_mask([0], len(prompt), None, device)
        mask = pad(own, (0, self._cache.capacity - len(prompt)), value=False)
        with predictor.gate.closed(), batch_invariant(predictor.base_model):
            hidden = predictor.run_decoder(predictor.embed(token_ids), position_ids, mask, self._cache)
            distribution = self._sampling.distribution(predictor.logits(hidden[:, -1:]))
        self._length.fill_(len(prompt))
        self._start.fill_(1)
        self._tokens.zero_()
        self._tokens[:, :1] = pick(self._auxiliaries[:, :1], distribution)
        return int(self._tokens[0, 0])

    def _mask(self) -> Tensor:
        """`[1, 1, Q, capacity]`: committed tokens, and the keys of the call after them according to `_own_mask`."""
        num_queries = len(self._own_mask)
        keys = torch.arange(self._cache.capacity, device=self._length.device) - self._length  # index in the call
        own = self._own_mask.index_select(1, keys.clamp(0, num_queries - 1)) & (keys < num_queries)
        return (own | (keys < 0))[None, None]

    def _slot_embeddings(self, lookahead: Lookahead) -> Tensor:
        stands_for = self._start + lookahead.anchors + lookahead.offsets
        pairs = torch.stack([self._auxiliaries[0, stands_for], self._auxiliaries[0, stands_for + 1]], dim=-1)
        return self._predictor.embed_slots(pairs, self._sampling.settings).squeeze(2)

    def _next_draft(self, slots: Tensor, correct: Tensor) -> Tensor:
        """`[1, D]`: the draft of the branch after `correct` tokens; after its end, tokens of other branches."""
        if self._lookahead is None:
            return self._tokens[:, 1:]
        offsets = torch.arange(self._draft_length, device=slots.device)
        selected = slots[:, (self._branch_starts[correct] + offsets).clamp_max(self._num_slots - 1)]
        logits = self._predictor.slot_logits(selected)
        draft = self._drafter(logits, self._auxiliaries_from(self._start, self._draft_length), ())
        if self._forced_draft is None:
            return draft
        forced = self._forced_draft[self._start + offsets]
        return torch.where(offsets < self._branches[correct], forced, -1).clamp_min(0)[None]

    def _auxiliaries_from(self, start: Tensor, length: int) -> Tensor:
        return self._auxiliaries[:, start + torch.arange(length, device=start.device)]


def capture(call: Callable[[], None], device: torch.device) -> Callable[[], Any]:
    """`call` itself on a CPU; on a GPU, the replay of its CUDA graph."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries initialise in the first calls
        for _ in range(NUM_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _FixedCache(Cache):
    """A cache of one row with a fixed number of columns.

    Args:
        capacity: number of columns.

    Attributes:
        columns: `[T]`, columns to which the next call writes.
    """

    columns: Tensor

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        super().__init__(layer_class_to_replicate=partial(_FixedLayer, self))  # pyright: ignore[reportArgumentType]


class _FixedLayer(PreallocatedLayer[_FixedCache]):
    """One layer of `_FixedCache`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[1, heads, T, head size]` to the columns; returns all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._cache.columns, key_states)
        self.values.index_copy_(2, self._cache.columns, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always passed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.capacity, 0

    def get_max_length(self) -> int:
        return self._cache.capacity
