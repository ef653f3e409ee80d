"""The contract of `Objective`."""

from __future__ import annotations

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick, token_interval
from ptp_lightning.losses import OBJECTIVES
from ptp_lightning.models.slots.objectives import Objective
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution
from ptp_lightning.testing.contract import generator, require, require_plain_data, uniform

NUM_SLOTS, VOCABULARY = 40, 8
NUM_CELLS = 2000
SAMPLINGS = (
    SamplingConfig(),
    SamplingConfig(temperature=0.7, top_k=5),
    SamplingConfig(temperature=0.7, top_k=5, top_p=0.8),
    SamplingConfig(top_p=0.8, order="descending"),
)


def check_objective(objective: Objective) -> None:
    """Check that an objective keeps the promises of its base class.

    Raises:
        AssertionError: says which one is broken.

    >>> from ptp_lightning.models import OneHotObjective
    >>> check_objective(OneHotObjective())
    """
    require(
        objective.name in OBJECTIVES,
        f"expected a name out of {sorted(OBJECTIVES)}, by which losses say whether they are sound, found "
        f"{objective.name!r}",
    )
    _check_inputs(objective)
    for seed, sampling in enumerate(SAMPLINGS):
        _check_drafts(objective, sampling, seed)
    require_plain_data(objective=objective)


def _check_inputs(objective: Objective) -> None:
    for length in (2, 5):
        inputs = objective.inputs(uniform(3, length))
        require(
            len(inputs) == objective.num_inputs,
            f"expected {objective.num_inputs} auxiliaries of a slot (num_inputs), found {len(inputs)}",
        )
        for one in inputs:
            require(
                one.shape == (3, length - 1),
                f"expected auxiliaries of the {length - 1} slots of a window of {length}, found {tuple(one.shape)}",
            )


def _check_drafts(objective: Objective, sampling: SamplingConfig, seed: int) -> None:
    """Tokens and probabilities, and that these say how often those are correct."""
    logits, tokens, teacher = example_slots(seed, sampling)
    sampler = Sampler(sampling)
    u = uniform(NUM_SLOTS)
    drafted = objective.tokens_from_logits(logits, u, sampler)
    require(
        drafted.shape == (NUM_SLOTS,) and drafted.dtype == torch.int64,
        f"expected int64 tokens of the shape {(NUM_SLOTS,)}, found {drafted.dtype} of {tuple(drafted.shape)}",
    )
    require(
        ((drafted >= 0) & (drafted < VOCABULARY)).all(), f"expected tokens below {VOCABULARY}, found {drafted.max()}"
    )
    choices, probabilities = objective.likely_tokens(logits, u, sampler, 3)
    require(
        choices.shape == probabilities.shape and torch.equal(choices[:, 0], drafted),
        "expected likely_tokens to begin with the token of tokens_from_logits, and a probability of each",
    )
    require(
        (probabilities.diff(dim=1) <= 0).all() and (probabilities.sum(dim=1) <= 1 + 1e-6).all(),
        "expected probabilities of likely_tokens that fall and sum to 1 at most",
    )
    probability = objective.correct_probability(logits.requires_grad_(), tokens, teacher, sampler)
    logits = logits.detach()
    require(not probability.requires_grad, "expected correct_probability without a gradient")
    require(
        probability.shape == (NUM_SLOTS,) and probability.dtype in (torch.float32, torch.float64),
        f"expected one float32 or float64 number for each slot, found {probability.dtype} of {probability.shape}",
    )
    require(
        ((probability >= 0) & (probability <= 1)).all(),
        f"expected probabilities in [0, 1], found {probability.aminmax()}",
    )
    if objective.predicts_distribution:
        counted = _counted(objective, logits, tokens, teacher, sampler)
        # An interval has two ends, each of which a cell of the grid may straddle.
        torch.testing.assert_close(
            probability.double(),
            counted,
            rtol=0,
            atol=2 / NUM_CELLS,
            msg=lambda text: f"correct_probability is not how often tokens_from_logits gives the token: {text}",
        )


def example_slots(seed: int, sampling: SamplingConfig) -> tuple[Tensor, Tensor, TokenDistribution]:
    """Student logits that agree roughly with the teacher, tokens of the teacher, its distributions."""
    source = generator(seed)
    base = 2 * torch.randn(NUM_SLOTS, VOCABULARY, generator=source)
    teacher = sampling.distribution(base)
    tokens = pick(torch.rand(NUM_SLOTS, generator=source, dtype=torch.float64), teacher)
    return base + 0.5 * torch.randn(NUM_SLOTS, VOCABULARY, generator=source), tokens, teacher


def _counted(
    objective: Objective, logits: Tensor, tokens: Tensor, teacher: TokenDistribution, sampler: Sampler
) -> Tensor:
    """Every u of a fine grid in the token's interval drafts a token: the fraction that is correct."""
    lower, upper = token_interval(teacher, tokens)
    r = (torch.arange(NUM_CELLS, dtype=torch.float64) + 0.5) / NUM_CELLS
    u = lower[:, None] + r * (upper - lower)[:, None]
    drafted = objective.tokens_from_logits(logits[:, None].expand(-1, NUM_CELLS, -1), u, sampler)
    return (drafted == tokens[:, None]).double().mean(-1)
