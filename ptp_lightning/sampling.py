"""From logits to the distribution that is sampled from: temperature, then top-k, then top-p.

The order in which the cumulative distribution runs through the vocabulary is a part of these settings: an auxiliary
`u` names a token only together with that order (arXiv:2512.21323).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Order = Literal["vocabulary", "descending", "embedding"]

SMALLEST_TEMPERATURE = 1e-6  # below this, logit differences overflow float32; exactly 0 is greedy
MASS_UNITS = 2.0**52  # the cumulative distribution counts probability in whole units of 2^-52


def require(valid: Tensor, values: Tensor, message: str) -> None:
    """Raise unless all of the bool tensor `valid` is true; `values` (same shape) is what the error reports.

    On CUDA the check stays on the device (no host synchronisation) and the error surfaces at a later call.

    Raises:
        ValueError: with `message`, the first offending value, and how many there are.
    """
    if valid.is_cuda:
        torch._assert_async(valid.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif not valid.all():
        offending = values[~valid]
        raise ValueError(f"{message}; found {offending[0].item()} ({offending.numel()} of {values.numel()})")


def sizes_may_depend_on_values(tensor: Tensor) -> bool:
    """Whether asking this tensor for values costs nothing, so that work may be left out that they make needless.

    Tensors of a plan for a GPU lie on a CPU and say that they do not.
    """
    return tensor.device.type == "cpu" and not tensor.is_cuda


def leading(index: Any) -> tuple[Any, ...]:
    """An index into the shape `[...]`, as one into tensors `[..., K]` that leaves the last dimension whole."""
    return (*index, slice(None)) if isinstance(index, tuple) else (index, slice(None))


class TokenDistribution(NamedTuple):
    """Distributions over tokens, listed in the order in which the cumulative distribution runs.

    Attributes:
        probabilities: `[..., K]`, float32 or float64, each row sums to 1; 0 marks a removed token.
        token_ids: `[..., K]`, int64, no id twice in a row; None means that K = V and entry k is token k.
    """

    probabilities: Tensor
    token_ids: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the distributions: `[...]`."""
        return self.probabilities.shape[:-1]

    def at(self, index: Any) -> TokenDistribution:
        """Some of them: `index` is what a tensor of the shape `[...]` would be indexed with."""
        index = leading(index)
        return TokenDistribution(self.probabilities[index], None if self.token_ids is None else self.token_ids[index])

    def flat(self) -> TokenDistribution:
        """One after the other: `[... , K]` as `[M, K]`."""
        token_ids = self.token_ids
        return TokenDistribution(
            self.probabilities.flatten(0, -2), None if token_ids is None else token_ids.flatten(0, -2)
        )

    def now(self) -> TokenDistribution:
        """Themselves; see `LazyDistributions.now`."""
        return self

    def blocks(self, size: int) -> Iterator[TokenDistribution]:
        """All `[M]` of them, `size` at a time."""
        for start in range(0, max(len(self.probabilities), 1), size):
            yield self.at(slice(start, start + size))

    @torch.no_grad()
    def units(self) -> Tensor:
        """Probability in whole units of 2^-52: `[..., K]`, float64.

        Whole numbers below 2^53 add without rounding. Sums of them therefore do not depend on the order of adding, on
        batch shape or on device, and entries of probability zero change none of them. A probability below 2^-53 counts
        as zero.
        """
        return self.probabilities.to(torch.float64, copy=True).mul_(MASS_UNITS).round_()

    @torch.no_grad()
    def cumulative_units(self) -> Tensor:
        """Cumulative probability in `units`: `[..., K]`, float64, never decreasing."""
        return self.units().cumsum_(-1)

    @torch.no_grad()
    def interval(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """`F_{k-1}` and `F_k` `[...]` of entries k `[...]`, the very numbers of `cdf`, without all the others."""
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
        """Where tokens `[...]` are listed: (index `[...]` into K, found `[...]` bool); index 0 where not found."""
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

    Tokens are ranked by (logit descending, token id ascending), so ties are decided alike in every batch shape and on
    every device.

    Args:
        temperature: divides the logits; 0 is greedy decoding.
        top_k: keep the `top_k` first-ranked tokens; None, or more than the vocabulary, keeps all.
        top_p: of these, renormalised, keep a token if the ones ranked before it have less than this mass together.
            The first always stays.
        order: how the cumulative distribution runs through the kept tokens: by rank ("descending") or by token id
            ("vocabulary", the cumulative distribution of the paper), or with similar tokens side by side
            ("embedding", a fixed permutation that a `Sampler` adds, see `ptp_lightning.models.token_order`). In a fixed
            order, estimates of a distribution agree with it on more tokens: two near-tied tokens that swap ranks swap
            their places by rank, and nothing by id.

    Raises:
        ValueError: for a value out of range; names the key.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    order: Order = "vocabulary"

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

    def lists_all(self, vocab_size: int) -> bool:
        """Whether distributions list every token of the vocabulary."""
        return self.temperature > 0 and (self.top_k is None or self.top_k >= vocab_size)

    def target(self) -> SamplingConfig:
        """What students learn: everything but top-p.

        A network cannot fit the edge of a nucleus, but it need not: given the distribution before the cut, `proposal`
        cuts as exactly as the teacher does.
        """
        return replace(self, top_p=1.0)

    def proposal(self) -> SamplingConfig:
        """Settings for student logits: they were trained on `target`, so the temperature must not act again."""
        return replace(self, temperature=1.0 if self.temperature > 0 else 0.0)

    def slot_auxiliaries(self, auxiliaries: Tensor) -> Tensor:
        """What slots are told of `auxiliaries`: greedy decoding ignores u, so one that names a likely token."""
        if self.temperature > 0:
            return auxiliaries
        # By rank, u = 0 is the most likely token; in a fixed order, the middle is a fair guess.
        return torch.full_like(auxiliaries, 0.0 if self.order == "descending" else 0.5)

    def teacher_and_target(
        self, logits: Tensor, token_ranks: Tensor | None = None
    ) -> tuple[TokenDistribution, TokenDistribution]:
        """`distribution(...)` and `target().distribution(...)` of the same logits; ranks the tokens once."""
        if self.top_p == 1 or self.temperature == 0:
            distribution = self.distribution(logits, token_ranks)
            return distribution, distribution
        scores, token_ids = self._candidates(logits, _peak(logits))
        return (
            self._listed(self._keep_top_p(scores), token_ids, logits, token_ranks),
            self._listed(scores, token_ids, logits, token_ranks),
        )

    def distribution(self, logits: Tensor, token_ranks: Tensor | None = None) -> TokenDistribution:
        """The distribution to sample from, in float32 (float64 for float64 logits); differentiable in the logits.

        Args:
            logits: `[..., V]`, any float dtype; -inf is a token of probability zero.
            token_ranks: `[V]` int64, the place of each token in the order "embedding"; the other orders need none.

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
        if self.top_p == 1 and self._num_candidates(logits) == logits.shape[-1] and self.order != "descending":
            probabilities = self._scores(logits, peak).softmax(-1)
            if self.order == "vocabulary":
                return TokenDistribution(probabilities)
            token_ids = self._required(token_ranks, logits).argsort()
            return TokenDistribution(probabilities[..., token_ids], token_ids.expand(logits.shape))
        scores, token_ids = self._candidates(logits, peak)
        return self._listed(self._keep_top_p(scores), token_ids, logits, token_ranks)

    def _num_candidates(self, logits: Tensor) -> int:
        return min(self.top_k or logits.shape[-1], logits.shape[-1])

    def _candidates(self, logits: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and ids `[..., K]` of the first-ranked tokens, in rank order."""
        token_ids = rank(logits.detach(), self._num_candidates(logits))
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
            found = "none" if token_ranks is None else f"{len(token_ranks)} places"
            raise ValueError(
                f"order {self.order!r} needs the places of {logits.shape[-1]} tokens, found {found}: take the sampler "
                "of a predictor that was trained with predictor.sampling.order: embedding"
            )
        return token_ranks

    def _scores(self, logits: Tensor, peak: Tensor) -> Tensor:
        # Subtracting the peak first keeps a low temperature from overflowing.
        dtype = _compute_dtype(logits)
        return (logits.to(dtype) - peak.to(dtype)) / self.temperature

    def _keep_top_p(self, scores: Tensor) -> Tensor:
        """Scores `[..., K]` in rank order, with -inf where the tokens before already hold `top_p` of the mass."""
        if self.top_p == 1:
            return scores
        units = TokenDistribution(scores.softmax(-1)).cumulative_units()
        before = torch.nn.functional.pad(units[..., :-1], (1, 0))
        return scores.masked_fill(before >= self.top_p * units[..., -1:], -math.inf)


@dataclass(frozen=True)
class Sampler:
    """Sampling settings together with the permutation that the order "embedding" runs through.

    Args:
        settings: how logits become a distribution.
        token_ranks: `[V]` int64, the place of each token; None where the order needs none.
    """

    settings: SamplingConfig
    token_ranks: Tensor | None = None

    def proposal(self) -> Sampler:
        """For student logits, see `SamplingConfig.proposal`."""
        return replace(self, settings=self.settings.proposal())

    def distribution(self, logits: Tensor) -> TokenDistribution:
        """See `SamplingConfig.distribution`."""
        return self.settings.distribution(logits, self.token_ranks)

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


def rank(logits: Tensor, k: int) -> Tensor:
    """Ids `[..., k]` of the first k tokens of `[..., V]` by (logit descending, token id ascending).

    `torch.topk` leaves the order of equal values open, so equal values get distinct keys. Float32 on CPU needs keys
    only in the few rows with a tie among the first k + 1 values.
    """
    # Exact alternatives on [4096, 2048], k = 50, one thread (float32 / bfloat16, where most rows hold a tie):
    # topk with keys for tied rows 70 / 190 ms, keys for all rows 120 / 130 ms, stable sort 460 / 500 ms.
    if logits.dtype == torch.float64:  # too wide for a key
        return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    if logits.dtype != torch.float32 or logits.is_cuda:  # on CUDA, selecting tied rows would wait for the device
        return _rank_by_key(logits, k)
    best, token_ids = logits.topk(min(k + 1, logits.shape[-1]))
    token_ids = token_ids[..., :k]
    tied = (best[..., 1:] == best[..., :-1]).any(-1)
    if tied.any():
        token_ids[tied] = _rank_by_key(logits[tied], k)
    return token_ids


def _rank_by_key(logits: Tensor, k: int) -> Tensor:
    """`rank` through distinct int64 keys: the logit in the high 32 bits, the complement of the id in the low 32."""
    low_bits = 2**32 - 1
    keys = (logits.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into +0.0
    keys ^= (keys >> 31) & 0x7FFFFFFF  # negative floats order backwards as integers
    keys = keys.long()
    keys <<= 32
    keys |= low_bits - torch.arange(logits.shape[-1], device=logits.device)
    return low_bits - (keys.topk(k).values & low_bits)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
