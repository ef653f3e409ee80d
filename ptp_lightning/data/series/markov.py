"""MarkovSeries: random chains of a chosen entropy whose conditionals are known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.data.corpus import Split
from ptp_lightning.data.series.series import RowSampler, Series
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.utils.randomness import keyed_generator

LARGEST_ORDER = 3
MAX_HISTORIES = 2**11  # a linear system of this size is solved for every bisection
BISECTIONS = 40
STATIONARY_TOLERANCE = 1e-10  # what a step may change of the stationary distribution, all histories together
LARGEST_SHARPNESS = 2.0**20


@dataclass(frozen=True)
class MarkovSeries(Series):
    """A stationary Markov chain: each token depends on the `order` tokens before it and on nothing else.

    Transition probabilities are the softmax of normal random numbers times one sharpness, which is chosen by bisection
    such that the conditional entropy, averaged over the stationary distribution, is `entropy`. Rows are drawn afresh,
    without end; the validation and test rows are fixed by `seed`.

    A `history` is the last `order` tokens, oldest first; places before the known part of the series hold the id
    `vocab_size`, for which the conditionals average over what the chain may have been there.

    Args:
        order: 1 to 3.
        vocab_size: V.
        entropy: average nats per token, 0 < entropy <= ln V.
        seed: of the transition probabilities and of the fixed rows.

    Raises:
        ValueError: a value is out of range.
    """

    order: int = 1
    vocab_size: int = 5
    entropy: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what has no chain."""
        if not 1 <= self.order <= LARGEST_ORDER:
            raise ValueError(f"expected data.series.order between 1 and {LARGEST_ORDER}, found {self.order}")
        if self.vocab_size < 2:
            raise ValueError(f"expected data.series.vocab_size >= 2, found {self.vocab_size}")
        if self.vocab_size**self.order > MAX_HISTORIES:
            raise ValueError(
                f"expected at most {MAX_HISTORIES} histories, found {self.vocab_size} to the power of {self.order}: "
                "lower data.series.vocab_size or data.series.order"
            )
        if not 0 < self.entropy <= math.log(self.vocab_size):
            raise ValueError(
                f"expected data.series.entropy above 0 and at most ln {self.vocab_size} = "
                f"{math.log(self.vocab_size):.4f} nats, found {self.entropy}"
            )

    def conditionals(self, history: Tensor) -> Tensor:
        """Distributions of the next token: histories `[..., order]` to probabilities `[..., V]`, float64, exact."""
        known = history < self.vocab_size
        num_known = known.sum(-1)
        # Tables of 0, 1, .. known tokens lie one after the other; unknown places come first, so 0 in them adds nothing.
        first_row = torch.tensor([sum(self.vocab_size**i for i in range(j)) for j in range(self.order + 1)])
        digit = torch.tensor([self.vocab_size**place for place in reversed(range(self.order))])
        row = first_row.to(history.device)[num_known] + (history * known * digit.to(history.device)).sum(-1)
        return self._tables.to(history.device)[row]

    def draw_rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Independent stretches `[count, length]` of the stationary chain, int64."""
        u = draw_auxiliaries((count, length), generator, "cpu")
        tokens = torch.full((count, self.order + length), self.vocab_size)
        for place in range(length):
            P = TokenDistribution(self.conditionals(tokens[:, place : place + self.order]))
            tokens[:, self.order + place] = pick(u[:, place], P)
        return tokens[:, self.order :]

    def row_sampler(self, split: Split, length: int) -> RowSampler:
        """See `Series.row_sampler`; every split is the same chain."""
        return lambda count, generator: self.draw_rows(count, length, generator)

    def fixed_rows(self, split: Split, length: int, count: int) -> Tensor:
        """See `Series.fixed_rows`."""
        return self.draw_rows(count, length, keyed_generator(self.seed, "fixed rows", split))

    def marginal_divergence(self, length: int) -> Tensor:
        """What a prediction that cannot know the window's own earlier tokens must lose: `[length]`, nats, float64.

        Entry k is the least average KL(conditional of token k || prediction of token k) among predictions that see only
        the `order` or more tokens before the window: the conditional mutual information between token k and the
        tokens before it in the window. The product of marginals attains it.
        """
        states = torch.eye(self.stationary.numel(), dtype=torch.float64)  # [start, state of the chain at position k]
        losses = []
        for _ in range(length):
            marginals = states @ self.transitions
            losses.append(self.stationary @ _entropies(marginals) - self.stationary @ _entropies(self.transitions))
            states = self._advance(states)
        return torch.stack(losses)

    @property
    def transitions(self) -> Tensor:
        """`[V^order, V]` float64: the conditionals of full histories, which count with the oldest token first."""
        return self._chain[0]

    @property
    def stationary(self) -> Tensor:
        """`[V^order]` float64: how often each full history occurs."""
        return self._chain[1]

    @cached_property
    def _chain(self) -> tuple[Tensor, Tensor]:
        generator = keyed_generator(self.seed, "transitions", self.order, self.vocab_size)
        scores = torch.randn(self.vocab_size**self.order, self.vocab_size, generator=generator, dtype=torch.float64)

        def chain(sharpness: float) -> tuple[Tensor, Tensor]:
            transitions = (sharpness * scores).softmax(-1)
            return transitions, self._stationary(transitions)

        def entropy(sharpness: float) -> float:
            transitions, stationary = chain(sharpness)
            return float(stationary @ _entropies(transitions))

        too_blunt, sharp_enough = 0.0, 1.0
        while entropy(sharp_enough) > self.entropy:
            too_blunt, sharp_enough = sharp_enough, 2 * sharp_enough
            if sharp_enough > LARGEST_SHARPNESS:
                raise ValueError(_no_chain(self.entropy))
        for _ in range(BISECTIONS):
            middle = (too_blunt + sharp_enough) / 2
            if entropy(middle) > self.entropy:
                too_blunt = middle
            else:
                sharp_enough = middle
        return chain(sharp_enough)

    def _stationary(self, transitions: Tensor) -> Tensor:
        """The distribution `[V^order]` of histories that a step leaves as it is."""
        unchanged = torch.eye(len(transitions), dtype=torch.float64)
        equations = (self._advance(unchanged, transitions) - unchanged).T
        # They add up to nothing, so one of them says nothing new: in its place, all probabilities add up to 1.
        equations[-1] = 1
        stationary, _ = torch.linalg.solve_ex(equations, unchanged[-1])
        stationary = stationary.clamp_min(0) / stationary.clamp_min(0).sum()
        change = (self._advance(stationary[None], transitions)[0] - stationary).abs().sum()
        if not change <= STATIONARY_TOLERANCE:  # or NaN
            raise ValueError(_no_chain(self.entropy))
        return stationary

    def _advance(self, states: Tensor, transitions: Tensor | None = None) -> Tensor:
        """Distributions over histories `[..., V^order]`, one token later."""
        V = self.vocab_size
        table = (self.transitions if transitions is None else transitions).view(V, -1, V)  # oldest, others, next
        return torch.einsum("soh,oht->sht", states.view(len(states), V, -1), table).reshape(len(states), -1)

    @cached_property
    def _tables(self) -> Tensor:
        """`[1 + V + .. + V^order, V]`: conditionals given the last 0, 1, .. order tokens."""
        joint = self.stationary[:, None] * self.transitions
        tables = [self.transitions]
        for num_known in reversed(range(self.order)):
            seen = joint.view(-1, self.vocab_size**num_known, self.vocab_size).sum(0)
            tables.insert(0, seen / seen.sum(-1, keepdim=True))
        return torch.cat(tables)


def _entropies(probabilities: Tensor) -> Tensor:
    """`[..., V]` to `[...]`, nats."""
    return torch.special.entr(probabilities).sum(-1)


def _no_chain(entropy: float) -> str:
    return (
        f"expected an entropy that a chain with one stationary distribution has, found {entropy} nats, for which it is "
        "all but deterministic: raise data.series.entropy or change data.series.seed"
    )
