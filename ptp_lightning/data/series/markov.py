"""MarkovSeries: random Markov chains of a given entropy, with exactly known conditional distributions."""

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
MAX_HISTORIES = 2**11  # every bisection step solves a linear system of this size
BISECTIONS = 40
STATIONARY_TOLERANCE = 1e-10  # allowed change of the stationary distribution by one step, summed over all histories
LARGEST_SHARPNESS = 2.0**20


@dataclass(frozen=True)
class MarkovSeries(Series):
    """A stationary Markov chain: each token depends on the `order` tokens before it and on nothing else.

    Transition probabilities are the softmax of normal random numbers times a sharpness. The sharpness is found by
    bisection such that the conditional entropy, averaged over the stationary distribution, is `entropy`. Training rows
    are drawn anew without end; validation and test rows are fixed by `seed`.

    A `history` is the last `order` tokens, oldest first. Unknown tokens before the start of the series have the id
    `vocab_size`; the conditionals are averaged over them.

    Args:
        order: 1 to 3.
        vocab_size: V.
        entropy: average nats per token, 0 < entropy <= ln V.
        seed: of the transition probabilities and of the fixed rows.

    Raises:
        ValueError: a value is out of range.

    >>> chain = MarkovSeries(order=1, vocab_size=3, entropy=0.5)
    >>> chain.conditionals(torch.tensor([[0], [2]])).shape
    torch.Size([2, 3])
    """

    order: int = 1
    vocab_size: int = 5
    entropy: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
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
        # `_tables` concatenates the tables for 0, 1, .. known tokens. Unknown tokens count as 0 in the row index.
        first_row = torch.tensor([sum(self.vocab_size**i for i in range(j)) for j in range(self.order + 1)])
        digit = torch.tensor([self.vocab_size**power for power in reversed(range(self.order))])
        row = first_row.to(history.device)[num_known] + (history * known * digit.to(history.device)).sum(-1)
        return self._tables.to(history.device)[row]

    def draw_rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Independent samples `[count, length]` of the stationary chain, int64."""
        u = draw_auxiliaries((count, length), generator, "cpu")
        tokens = torch.full((count, self.order + length), self.vocab_size)
        for position in range(length):
            P = TokenDistribution(self.conditionals(tokens[:, position : position + self.order]))
            tokens[:, self.order + position] = pick(u[:, position], P)
        return tokens[:, self.order :]

    def row_sampler(self, split: Split, length: int) -> RowSampler:
        """See `Series.row_sampler`; all splits are samples of the same chain."""
        return lambda count, generator: self.draw_rows(count, length, generator)

    def fixed_rows(self, split: Split, length: int, count: int) -> Tensor:
        """See `Series.fixed_rows`."""
        return self.draw_rows(count, length, keyed_generator(self.seed, "fixed rows", split))

    def marginal_divergence(self, length: int) -> Tensor:
        """Minimum loss of predictions that do not depend on earlier tokens of the window: `[length]`, nats, float64.

        Entry k is the smallest average KL(conditional of token k || prediction of token k) among predictions that are
        conditioned only on the `order` or more tokens before the window. It is the conditional mutual information
        between token k and the tokens before it in the window, and the marginal of token k attains it.
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
        """`[V^order, V]` float64: the conditionals of full histories; the oldest token is the highest digit."""
        return self._chain[0]

    @property
    def stationary(self) -> Tensor:
        """`[V^order]` float64: the stationary probability of each full history."""
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

        low, high = 0.0, 1.0
        while entropy(high) > self.entropy:
            low, high = high, 2 * high
            if high > LARGEST_SHARPNESS:
                raise ValueError(_no_chain(self.entropy))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if entropy(middle) > self.entropy:
                low = middle
            else:
                high = middle
        return chain(high)

    def _stationary(self, transitions: Tensor) -> Tensor:
        """The distribution `[V^order]` of histories that a step does not change."""
        identity = torch.eye(len(transitions), dtype=torch.float64)
        equations = (self._advance(identity, transitions) - identity).T
        # The equations sum to zero, so one is redundant. It is replaced by the sum of all probabilities, which is 1.
        equations[-1] = 1
        stationary, _ = torch.linalg.solve_ex(equations, identity[-1])
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
        """`[1 + V + .. + V^order, V]`: the conditionals given the last 0, 1, .., `order` tokens."""
        joint = self.stationary[:, None] * self.transitions
        tables = [self.transitions]
        for num_known in reversed(range(self.order)):
            seen = joint.view(-1, self.vocab_size**num_known, self.vocab_size).sum(0)
            tables.insert(0, seen / seen.sum(-1, keepdim=True))
        return torch.cat(tables)


def _entropies(probabilities: Tensor) -> Tensor:
    """Entropies `[...]` of distributions `[..., V]`, in nats."""
    return torch.special.entr(probabilities).sum(-1)


def _no_chain(entropy: float) -> str:
    return (
        f"expected the entropy of a chain with a unique stationary distribution, found {entropy} nats, for which the "
        "chain is almost deterministic: raise data.series.entropy or change data.series.seed"
    )
