"""Decoding whose calls all have one shape, so that a CUDA graph can replay them.

The decoders of the package cannot be captured: their calls grow with the text, and lengths are known on the host. Here
the cache has its full size from the start, lengths stay on the device, and drafts that are shorter than the longest are
filled up. What is committed are the base model's own picks as ever, so that the text has to be the same.
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
from ptp_lightning.decoding.lookahead import Lookahead, place
from ptp_lightning.decoding.ragged_cache import LayerWithRoom
from ptp_lightning.models import PredictorNetwork

NUM_WARM_UP = 3
UNUSED_AUXILIARY = 0.5  # past the end of a text any number will do


class CapturedDecoder:
    """Partial quadratic decoding of one text; without branches, one token a call.

    Args:
        predictor: in eval mode; with branches, slots have to be in the base model's own call, and nothing refines them.
        settings: of the text.
        prompt_length: of all prompts.
        branches: slots after 0, 1, .. D correct tokens of a draft of D; none for one token a call.
        guesses: what is proposed at each place of the text instead of what the predictor proposes; -1 past its end.

    Raises:
        ValueError: slots are asked for, and the predictor has a refiner or a copy of the base model; or a branch is
            longer than a draft.
    """

    @torch.inference_mode()
    def __init__(
        self,
        predictor: PredictorNetwork,
        settings: GenerationSettings,
        prompt_length: int,
        branches: Sequence[int] = (),
        guesses: Tensor | None = None,
    ) -> None:
        if branches and (predictor.refiner is not None or predictor.student_copy is not None):
            raise ValueError("expected a predictor with neither a refiner nor a copied student, found one that has it")
        num_drafted = max(0, len(branches) - 1)
        if max(branches, default=0) > num_drafted:
            raise ValueError(f"expected branches of at most {num_drafted} slots, as a draft has, found {branches}")
        device = predictor.base_model.device
        self._predictor = predictor
        self._max_new_tokens = settings.max_new_tokens
        self._sampling = predictor.sampler(settings.sampling)
        self._drafter = StudentDrafter(predictor.config.objective, self._sampling)
        self._num_drafted, self._num_slots = num_drafted, sum(branches)
        self._lookahead = Lookahead.branches([1], [branches], device) if self._num_slots else None
        self._places, own = place([0], 1 + num_drafted, self._lookahead, device)
        self._own = own[0, 0]  # what the call's queries see of the call, [Q, Q]
        num_queries = len(self._own)
        self._branches = torch.tensor([*branches], device=device, dtype=torch.long)
        self._firsts = self._branches.cumsum(0) - self._branches
        room = 2 * num_queries  # what is written behind a text's end
        self._auxiliaries = pad(settings.auxiliaries(1, device), (0, room), value=UNUSED_AUXILIARY)
        self._guesses = None if guesses is None else pad(guesses, (0, room), value=-1)
        self._cache = _FixedCache(prompt_length + settings.max_new_tokens + room)
        # The state, always at the same addresses.
        self._length = torch.zeros(1, dtype=torch.long, device=device)  # kept tokens
        self._start = torch.ones(1, dtype=torch.long, device=device)  # new tokens so far
        self._tokens = torch.zeros(1, 1 + num_drafted, dtype=torch.long, device=device)  # the newest, then a draft
        self._found = torch.zeros(1, 2 + num_drafted, dtype=torch.long, device=device)  # correct ones, then picks
        self._begin([0] * prompt_length)
        self._replay = captured(self.call, device)

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The new tokens, and how many calls they took, with the one that reads the prompt."""
        text, num_calls = [self._begin(prompt)], 1
        while len(text) < self._max_new_tokens:
            self._replay()
            num_correct, *picks = self._found.tolist()[0]
            text += picks[: num_correct + 1]
            num_calls += 1
        return text[: self._max_new_tokens], num_calls

    @torch.inference_mode()
    def call_seconds(self, prompt: Sequence[int], num_calls: int, clock: Callable[[], float]) -> float:
        """Seconds of one of several calls behind a prompt, of which the host waits for the last alone."""
        self._begin(prompt)
        begin = clock()
        for _ in range(num_calls):
            self._replay()
        return (clock() - begin) / num_calls

    def call(self) -> None:
        """One call, of the same operations each time: verify, look ahead, commit, propose."""
        with batch_invariant(self._predictor.base_model):
            self._call()

    def _call(self) -> None:
        predictor, num_read = self._predictor, self._tokens.shape[1]
        embeddings, position_ids, mask = predictor.embed(self._tokens), self._length + self._places, self._mask()
        self._cache.columns = self._length + torch.arange(len(self._own), device=self._length.device)
        if self._lookahead is None:
            with predictor.gate.closed():
                hidden = predictor.run_decoder(embeddings, position_ids, mask, self._cache)
        else:
            slots = self._slot_embeddings(self._lookahead).to(embeddings.dtype)
            with predictor.gate.open(suffix=self._num_slots):
                hidden = predictor.run_decoder(torch.cat([embeddings, slots], dim=1), position_ids, mask, self._cache)
        distribution = self._sampling.distribution(predictor.logits(hidden[:, :num_read]))
        picks = pick(self._of_new_tokens(self._start, num_read), distribution)
        correct = (self._tokens[:, 1:] == picks[:, :-1]).cumprod(dim=1).sum(dim=1, keepdim=True)
        self._found.copy_(torch.cat([correct, picks], dim=1))
        self._length += 1 + correct[0]
        self._start += 1 + correct[0]
        draft = self._propose(hidden[:, num_read:], correct[0])
        self._tokens.copy_(torch.cat([picks.gather(1, correct), draft], dim=1))

    def _begin(self, prompt: Sequence[int]) -> int:
        """Read a prompt; returns the first new token."""
        predictor, device = self._predictor, self._length.device
        token_ids = torch.tensor([list(prompt)], device=device)
        self._cache.columns = torch.arange(len(prompt), device=device)
        position_ids, own = place([0], len(prompt), None, device)
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
        """`[1, 1, Q, capacity]`: kept tokens, and of the call's own keys, which lie behind them, those of `_own`."""
        num_queries = len(self._own)
        keys = torch.arange(self._cache.capacity, device=self._length.device) - self._length  # as columns of the call
        own = self._own.index_select(1, keys.clamp(0, num_queries - 1)) & (keys < num_queries)
        return (own | (keys < 0))[None, None]

    def _slot_embeddings(self, lookahead: Lookahead) -> Tensor:
        stand_for = self._start + lookahead.anchors + lookahead.offsets
        pairs = torch.stack([self._auxiliaries[0, stand_for], self._auxiliaries[0, stand_for + 1]], dim=-1)
        return self._predictor.embed_slots(pairs, self._sampling.settings).squeeze(2)

    def _propose(self, slots: Tensor, correct: Tensor) -> Tensor:
        """`[1, D]`: what the slots of the right branch say; past its end, what others say, which is as good as any."""
        if self._lookahead is None:
            return self._tokens[:, 1:]
        offsets = torch.arange(self._num_drafted, device=slots.device)
        ahead = slots[:, (self._firsts[correct] + offsets).clamp_max(self._num_slots - 1)]
        logits = self._predictor.slot_logits(ahead)
        draft = self._drafter(logits, self._of_new_tokens(self._start, self._num_drafted), ())
        if self._guesses is None:
            return draft
        guesses = self._guesses[self._start + offsets]
        return torch.where(offsets < self._branches[correct], guesses, -1).clamp_min(0)[None]

    def _of_new_tokens(self, start: Tensor, length: int) -> Tensor:
        return self._auxiliaries[:, start + torch.arange(length, device=start.device)]


def captured(call: Callable[[], None], device: torch.device) -> Callable[[], Any]:
    """What does the same as `call`: on a GPU, the replay of a graph."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in calls before
        for _ in range(NUM_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _FixedCache(Cache):
    """Keys and values of one row in as many columns as there will ever be.

    Args:
        capacity: columns.

    Attributes:
        columns: `[T]`, where the next call writes.
    """

    columns: Tensor

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        super().__init__(layer_class_to_replicate=partial(_FixedLayer, self))  # pyright: ignore[reportArgumentType]


class _FixedLayer(LayerWithRoom[_FixedCache]):
    """One layer of it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[1, heads, T, head size]` to the columns; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._cache.columns, key_states)
        self.values.index_copy_(2, self._cache.columns, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0  # positions and masks are always given

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.capacity, 0

    def get_max_length(self) -> int:
        return self._cache.capacity
