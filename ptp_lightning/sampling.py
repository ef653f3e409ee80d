"""From logits to the distribution that is sampled from: temperature, then top-k, then top-p, then min-p.

The order in which the cumulative distribution lists the vocabulary is part of these settings: an auxiliary `u`
determines a token only together with that order (arXiv:2512.21323).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ptp_lightning.draft_vocabulary import DraftVocabulary
from ptp_lightning.token_ranking import rank_tokens

Order = Literal["vocabulary", "descending", "embedding"]

SMALLEST_TEMPERATURE = 1e-6  # below this, logit differences overflow float32; exactly 0 is greedy
MASS_UNITS = 2.0**52  # the cumulative distribution counts probability in integer units of 2^-52


def require(valid: Tensor, values: Tensor, message: str) -> None:
    """Raise unless the bool tensor `valid` is true everywhere; the error reports `values` (same shape).

    On CUDA the check stays on the device (no host synchronisation) and the error is raised by a later call.

    Raises:
        ValueError: with `message`, the first offending value, and how many there are.
    """
    if valid.is_cuda:
        torch._assert_async(valid.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif not valid.all():
        offending = values[~valid]
        raise ValueError(f"{message}; found {offending[0].item()} ({offending.numel()} of {values.numel()})")


def allows_dynamic_shapes(tensor: Tensor) -> bool:
    """Whether shapes may depend on this tensor's values, because reading them does not synchronise with a device.

    Fake tensors that plan for a GPU are stored on a CPU and report `is_cuda`, so they give False too.
    """
    return tensor.device.type == "cpu" and not tensor.is_cuda


def leading_index(index: Any) -> tuple[Any, ...]:
    """An index into the shape `[...]` as an index into tensors `[..., K]` that keeps the whole last dimension."""
    return (*index, slice(None)) if isinstance(index, tuple) else (index, slice(None))


class TokenDistribution(NamedTuple):
    """Distributions over tokens, listed in the order of the cumulative distribution.

    Attributes:
        probabilities: `[..., K]`, float32 or float64, each row sums to 1; 0 marks a removed token.
        token_ids: `[..., K]`, int64, no id twice in a row; None means that K = V and entry k is token k.

    >>> P = TokenDistribution(torch.tensor([0.5, 0.25, 0.25]), token_ids=torch.tensor([7, 2, 5]))
    >>> P.cdf()
    tensor([0.5000, 0.7500, 1.0000], dtype=torch.float64)
    >>> P.probability_of(torch.tensor(2))
    tensor(0.2500)
    """

    probabilities: Tensor
    token_ids: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape `[...]` of the distributions, without K."""
        return self.probabilities.shape[:-1]

    def at(self, index: Any) -> TokenDistribution:
        """The distributions at an index into a tensor of shape `[...]`."""
        index = leading_index(index)
        return TokenDistribution(self.probabilities[index], None if self.token_ids is None else self.token_ids[index])

    def flatten(self) -> TokenDistribution:
        """`[..., K]` as `[M, K]`."""
        token_ids = self.token_ids
        return TokenDistribution(
            self.probabilities.flatten(0, -2), None if token_ids is None else token_ids.flatten(0, -2)
        )

    def materialize(self) -> TokenDistribution:
        """These distributions; see `LazyDistributions.materialize`."""
        return self

    def blocks(self, size: int) -> Iterator[TokenDistribution]:
        """All `[M]` distributions, `size` at a time."""
        for start in range(0, max(len(self.probabilities), 1), size):
            yield self.at(slice(start, start + size))

    @torch.no_grad()
    def units(self) -> Tensor:
        """Probability in integer units of 2^-52: `[..., K]`, float64.

        Integers below 2^53 add without rounding. Their sums therefore do not depend on the order of summation, the
        batch shape or the device, and entries of probability zero do not change them. A probability below 2^-53 counts
        as zero.
        """
        return self.probabilities.to(torch.float64, copy=True).mul_(MASS_UNITS).round_()

    @torch.no_grad()
    def cumulative_units(self) -> Tensor:
        """Cumulative probability in `units`: `[..., K]`, float64, never decreasing."""
        return self.units().cumsum_(-1)

    @torch.no_grad()
    def interval(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """`F_{k-1}` and `F_k` `[...]` of entries k `[...]`, exactly as in `cdf`, without dividing all entries."""
        units, index = self.units(), index.unsqueeze(-1)
        own = units.gather(-1, index)
        cumulative = units.cumsum_(-1)
        upper, total = cumulative.gather(-1, index), cumulative[..., -1:]
        return ((upper - own) / total).squeeze(-1), (upper / total).squeeze(-1)

    @torch.no_grad()
    def cdf(self) -> Tensor:
        """Cumulative distribution `F_k = sum_{l <= k} P_l`: `[..., K]`, float64; the last value is exactly 1."""
        units = self.cumulative_units()
        return units / units[..., -1:]

    def find(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of tokens `[...]` in the list: (index `[...]` into K, found `[...]` bool); 0 where not found."""
        if self.token_ids is None:
            found = (token_ids >= 0) & (token_ids < self.probabilities.shape[-1])
            return token_ids.where(found, 0), found
        found, index = (self.token_ids == token_ids[..., None]).max(-1)
        return index, found

    def probability_of(self, token_ids: Tensor) -> Tensor:
        """Probability `[...]` of tokens `[...]`; 0 for a token that is not listed."""
        index, found = self.find(token_ids)
        return self.probabilities.gather(-1, index[..., None]).squeeze(-1) * found


@dataclass(frozen=True)
class SamplingConfig:
    """How logits become the distribution that tokens are drawn from.

    Tokens are ranked by (logit descending, token id ascending), so ties are resolved equally in every batch shape and
    on every device.

    Args:
        temperature: divides the logits; 0 is greedy decoding.
        top_k: keep the `top_k` first-ranked tokens; None, or more than the vocabulary, keeps all.
        top_p: of these, renormalised, keep a token if the tokens ranked before it have less than this mass in total.
            The first is always kept.
        order: how the cumulative distribution orders the kept tokens: by token id ("vocabulary", the cumulative
            distribution of the paper), by rank ("descending"), or with similar tokens side by side ("embedding", a
            fixed permutation that a `Sampler` adds, see `ptp_lightning.models.token_order`). In a fixed order, an
            estimated distribution picks the teacher's token more often: if two near-tied tokens swap ranks, their
            intervals swap in the order "descending" and stay where they are in a fixed order.
        min_p: of the tokens that top-p keeps, keep those with at least this share of the largest probability.
        repetition_penalty: a token that the text or its prompt contains has its logit divided by this number, or
            multiplied if negative (arXiv:1909.05858). Like `no_repeat_ngram_size` it depends on all tokens before, so
            it takes part in decoding (see `PrefixPenalties`) but not in training. 1 is no penalty.
        no_repeat_ngram_size: n; no n consecutive tokens occur twice in the text and its prompt. 0 allows them.

    The last three are None by default. Where a text is decoded, the `generation_config.json` of the model's folder then
    decides, as in transformers; elsewhere, or if it says nothing, they are off.

    Raises:
        ValueError: for a value out of range; names the key.

    >>> logits = torch.tensor([1.0, 3.0, 2.0])
    >>> SamplingConfig(top_k=2).distribution(logits)
    TokenDistribution(probabilities=tensor([0.7311, 0.2689]), token_ids=tensor([1, 2]))
    >>> SamplingConfig(temperature=0).distribution(logits)  # greedy
    TokenDistribution(probabilities=tensor([1.]), token_ids=tensor([1]))
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    order: Order = "vocabulary"
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not SMALLEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or finite and >= {SMALLEST_TEMPERATURE}, found {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be null (keep all tokens) or >= 1, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must satisfy 0 < top_p <= 1, found {self.top_p}")
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, found {self.order!r}")
        if not 0 <= (self.min_p or 0) <= 1:
            raise ValueError(f"min_p must be null or satisfy 0 <= min_p <= 1, found {self.min_p}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be null or finite and > 0, found {self.repetition_penalty}")
        if (self.no_repeat_ngram_size or 0) < 0:
            raise ValueError(f"no_repeat_ngram_size must be null or >= 0, found {self.no_repeat_ngram_size}")

    @property
    def depends_on_prefix(self) -> bool:
        """Whether logits change with the tokens before them."""
        return self.repetition_penalty not in (None, 1) or bool(self.no_repeat_ngram_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without settings that are left open (None)."""
        open_values = ("min_p", "repetition_penalty", "no_repeat_ngram_size")
        return {name: value for name, value in vars(self).items() if value is not None or name not in open_values}

    def keeps_all_tokens(self, vocab_size: int) -> bool:
        """Whether distributions list every token of the vocabulary."""
        return self.temperature > 0 and (self.top_k is None or self.top_k >= vocab_size)

    def target(self) -> SamplingConfig:
        """Settings of the distributions that students learn: all but top-p and min-p.

        A network cannot fit the discontinuous edge of a nucleus. It learns the distribution before it instead, and
        `for_student` applies top-p and min-p to its logits exactly as the teacher does.

        >>> SamplingConfig(temperature=0.8, top_k=50, top_p=0.9).target() == SamplingConfig(temperature=0.8, top_k=50)
        True
        """
        return replace(self, top_p=1.0, min_p=None)

    def for_student(self) -> SamplingConfig:
        """Settings for student logits, which were trained on `target`: the temperature must not act a second time.

        >>> SamplingConfig(temperature=0.8, top_k=50, top_p=0.9).for_student() == SamplingConfig(top_k=50, top_p=0.9)
        True
        """
        return replace(self, temperature=1.0 if self.temperature > 0 else 0.0)

    def slot_auxiliaries(self, auxiliaries: Tensor) -> Tensor:
        """The auxiliaries that slots carry. Greedy decoding ignores u, so its slots carry one constant."""
        if self.temperature > 0:
            return auxiliaries
        # In the order "descending" u = 0 picks the most likely token; in a fixed order 1/2 is as likely as any.
        return torch.full_like(auxiliaries, 0.0 if self.order == "descending" else 0.5)

    def teacher_and_target(
        self, logits: Tensor, token_ranks: Tensor | None = None
    ) -> tuple[TokenDistribution, TokenDistribution]:
        """`distribution(...)` and `target().distribution(...)` of the same logits; ranks the tokens once."""
        if not self._has_edge or self.temperature == 0:
            distribution = self.distribution(logits, token_ranks)
            return distribution, distribution
        scores, token_ids = self._candidates(logits, _peak(logits))
        return (
            self._listed(self._keep_likely(scores), token_ids, logits, token_ranks),
            self._listed(scores, token_ids, logits, token_ranks),
        )

    def distribution(self, logits: Tensor, token_ranks: Tensor | None = None) -> TokenDistribution:
        """The distribution to sample from, in float32 (float64 for float64 logits); differentiable in the logits.

        Args:
            logits: `[..., V]`, any float dtype; -inf is a token of probability zero.
            token_ranks: `[V]` int64, the rank of each token in the order "embedding"; other orders need none.

        Returns:
            Candidates `[..., K]`, K = min(top_k, V), or K = 1 if greedy. In vocabulary order with K = V,
            `token_ids` is None.

        Raises:
            ValueError: if a row holds NaN or +inf, or nothing but -inf; if the order needs `token_ranks` of V tokens.
        """
        peak = _peak(logits)
        if self.temperature == 0:
            token_ids = logits.argmax(-1, keepdim=True)  # the first, hence the lowest id, among equals
            return TokenDistribution(torch.ones_like(peak, dtype=_compute_dtype(logits)), token_ids)
        if not self._has_edge and self._num_candidates(logits) == logits.shape[-1] and self.order != "descending":
            probabilities = self._scores(logits, peak).softmax(-1)
            if self.order == "vocabulary":
                return TokenDistribution(probabilities)
            token_ids = self._required(token_ranks, logits).argsort()
            return TokenDistribution(probabilities[..., token_ids], token_ids.expand(logits.shape))
        scores, token_ids = self._candidates(logits, peak)
        return self._listed(self._keep_likely(scores), token_ids, logits, token_ranks)

    def _num_candidates(self, logits: Tensor) -> int:
        return min(self.top_k or logits.shape[-1], logits.shape[-1])

    def _candidates(self, logits: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and ids `[..., K]` of the first-ranked tokens, in rank order."""
        token_ids = rank_tokens(logits.detach(), self._num_candidates(logits))
        return self._scores(logits.gather(-1, token_ids), peak), token_ids

    def _listed(
        self, scores: Tensor, token_ids: Tensor, logits: Tensor, token_ranks: Tensor | None
    ) -> TokenDistribution:
        """Scores and ids `[..., K]` in rank order, as a distribution in the configured order."""
        probabilities = scores.softmax(-1)
        if self.order == "descending":
            return TokenDistribution(probabilities, token_ids)
        if self.order == "vocabulary":
            token_ids, in_order = token_ids.sort(-1)
            implied = token_ids.shape[-1] == logits.shape[-1]
            return TokenDistribution(probabilities.gather(-1, in_order), None if implied else token_ids)
        in_order = self._required(token_ranks, logits)[token_ids].argsort(-1)
        return TokenDistribution(probabilities.gather(-1, in_order), token_ids.gather(-1, in_order))

    def _required(self, token_ranks: Tensor | None, logits: Tensor) -> Tensor:
        if token_ranks is None or token_ranks.shape != logits.shape[-1:]:
            found = "none" if token_ranks is None else f"{len(token_ranks)} ranks"
            raise ValueError(
                f"order {self.order!r} needs the ranks of {logits.shape[-1]} tokens, found {found}: use the sampler "
                "of a predictor that was trained with predictor.sampling.order: embedding"
            )
        return token_ranks

    def _scores(self, logits: Tensor, peak: Tensor) -> Tensor:
        # Subtracting the peak first keeps a low temperature from overflowing.
        dtype = _compute_dtype(logits)
        return (logits.to(dtype) - peak.to(dtype)) / self.temperature

    @property
    def _has_edge(self) -> bool:
        """Whether `_keep_likely` removes tokens."""
        return self.top_p < 1 or bool(self.min_p)

    def _keep_likely(self, scores: Tensor) -> Tensor:
        """Scores `[..., K]` in rank order, the first 0, with -inf where top-p or min-p removes a token.

        Top-p removes it where earlier tokens already have `top_p` of the mass.
        """
        kept = scores
        if self.top_p < 1:
            units = TokenDistribution(scores.softmax(-1)).cumulative_units()
            before = torch.nn.functional.pad(units[..., :-1], (1, 0))
            kept = kept.masked_fill(before >= self.top_p * units[..., -1:], -math.inf)
        if self.min_p:
            kept = kept.masked_fill(scores < math.log(self.min_p), -math.inf)
        return kept


@dataclass(frozen=True)
class Sampler:
    """Sampling settings with what depends on the predictor: its token order and its draft vocabulary.

    Args:
        settings: how logits become a distribution.
        token_ranks: `[V]` int64, the rank of each token in the order "embedding"; None for the other orders.
        draft_vocabulary: the tokens that slots can draft; None for all.
        columns: the tokens that the columns of logits stand for; None for all. Set by `for_student`.
    """

    settings: SamplingConfig
    token_ranks: Tensor | None = None
    draft_vocabulary: DraftVocabulary | None = None
    columns: DraftVocabulary | None = None

    def for_student(self) -> Sampler:
        """For logits of slots; see `SamplingConfig.for_student`.

        >>> sampler = Sampler(SamplingConfig(), draft_vocabulary=DraftVocabulary(torch.tensor([2, 5])))
        >>> sampler.for_student().distribution(torch.tensor([0.0, 0.0]))
        TokenDistribution(probabilities=tensor([0.5000, 0.5000]), token_ids=tensor([2, 5]))
        """
        return replace(self, settings=self.settings.for_student(), columns=self.draft_vocabulary)

    def distribution(self, logits: Tensor) -> TokenDistribution:
        """See `SamplingConfig.distribution`."""
        if self.columns is None:
            return self.settings.distribution(logits, self.token_ranks)
        tokens = self.columns.token_ids
        listed = self.settings.distribution(logits, None if self.token_ranks is None else self.token_ranks[tokens])
        return listed._replace(
            token_ids=tokens.expand(logits.shape) if listed.token_ids is None else tokens[listed.token_ids]
        )

    def teacher_and_target(self, logits: Tensor) -> tuple[TokenDistribution, TokenDistribution]:
        """See `SamplingConfig.teacher_and_target`."""
        return self.settings.teacher_and_target(logits, self.token_ranks)


def _peak(logits: Tensor) -> Tensor:
    """The largest logit `[..., 1]` of each row; raises unless it is finite."""
    peak = logits.detach().amax(-1, keepdim=True)  # NaN if any logit is NaN
    require(
        peak.isfinite(),
        peak,
        "the largest logit of every token position must be finite: a NaN or infinity comes from broken weights or "
        "16-bit overflow (try trainer.precision: 32-true)",
    )
    return peak


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
