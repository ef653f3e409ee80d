"""Maps between tokens and the columns of a draft vocabulary."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptp_lightning.draft_vocabulary import DraftVocabulary, most_frequent_tokens
from ptp_lightning.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    JensenShannon,
    KullbackLeibler,
    Loss,
    MixedLoss,
    NegativeLogOverlap,
    ReverseKullbackLeibler,
    SlotTargets,
    TotalVariation,
    WeightedLoss,
    over_draft_vocabulary,
)
from ptp_lightning.sampling import Sampler, SamplingConfig, TokenDistribution

V = 23
TOKENS = torch.tensor([1, 2, 5, 8, 9, 13, 14, 20])
VOCABULARY = DraftVocabulary(TOKENS)
N = len(TOKENS)


def random_targets(num_listed: int | None, num_rows: int = 40) -> TokenDistribution:
    """Top-k distributions, or distributions over all tokens; some rows have nothing in the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_rows, V, dtype=torch.float64, generator=generator)
    logits[0, 10:13] += 50
    logits[1, TOKENS] += 50
    return SamplingConfig(top_k=num_listed).distribution(logits)


def dense(distribution: TokenDistribution, size: int) -> Tensor:
    if distribution.token_ids is None:
        return distribution.probabilities
    zeros = torch.zeros(len(distribution.probabilities), size, dtype=torch.float64)
    return zeros.scatter_add(1, distribution.token_ids, distribution.probabilities)


@pytest.mark.parametrize("num_listed", [1, 3, 4, 7, 8, 9, 15, None])
def test_restricted_distributions(num_listed: int | None) -> None:
    """As in the definition, with no column twice in a row."""
    target = random_targets(num_listed)
    found = VOCABULARY.restrict(*target)
    inside = dense(target, V)[:, TOKENS]
    torch.testing.assert_close(found.mass, inside.sum(-1))
    if found.columns is not None:
        assert all(len(set(row)) == len(row) for row in found.columns.tolist())
        assert (found.columns >= 0).all() and (found.columns < N).all()
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones_like(found.mass))
    some = found.mass > 0
    assert some.any() and (num_listed not in (1, 3) or not some.all())
    columns = TokenDistribution(found.probabilities, found.columns)
    torch.testing.assert_close(dense(columns, N)[some], (inside / inside.sum(-1, keepdim=True))[some])


LOSSES: dict[str, Loss] = {
    "KL": KullbackLeibler(),
    "reverse KL": ReverseKullbackLeibler(),
    "JS": JensenShannon(),
    "TV": TotalVariation(),
    "overlap": NegativeLogOverlap(),
    "CE": CrossEntropy(),
    "BCE": BinaryCrossEntropy(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_listed", [4, 9, None])
def test_losses_are_those_of_the_rest(name: str, num_listed: int | None) -> None:
    """The mass of the target in the vocabulary times the loss of what is left of it; so are the gradients."""
    loss, target = LOSSES[name], random_targets(num_listed)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, N, dtype=torch.float64, generator=generator).requires_grad_()
    token_ids = torch.randint(V, (40,), generator=generator)
    inside = dense(target, V)[:, TOKENS]
    mass = inside.sum(-1)
    columns, found = VOCABULARY.columns(token_ids)
    assert torch.equal(found, torch.isin(token_ids, TOKENS)) and torch.equal(TOKENS[columns[found]], token_ids[found])
    rest = torch.where(mass[:, None] > 0, inside / mass[:, None], 1 / N)
    expected = loss.per_slot(logits, columns, TokenDistribution(rest)) * (mass if loss.needs_target else found)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)

    mapped = over_draft_vocabulary(loss, VOCABULARY)
    per_slot = mapped.per_slot(logits, token_ids, target)
    torch.testing.assert_close(per_slot, expected)
    torch.testing.assert_close(torch.autograd.grad(per_slot.sum(), logits)[0], gradient)
    out = torch.empty_like(logits)
    torch.testing.assert_close(mapped.with_gradients(logits.detach(), token_ids, target, out), expected.detach())
    torch.testing.assert_close(out, gradient)


def test_kullback_leibler_is_mass_times_cross_entropy_of_the_rest() -> None:
    """Up to a constant: its gradient is `m P - Q`, and the loss is exactly 0 for the best prediction."""
    target = random_targets(9)
    inside = dense(target, V)[:, TOKENS]
    mass = inside.sum(-1, keepdim=True)
    logits = torch.zeros(40, N, dtype=torch.float64, requires_grad=True)
    loss = over_draft_vocabulary(KullbackLeibler(), VOCABULARY)
    (gradient,) = torch.autograd.grad(loss.per_slot(logits, torch.zeros(40).long(), target).sum(), logits)
    torch.testing.assert_close(gradient, mass / N - inside)
    best = (inside / mass).log()[mass.squeeze(-1) > 0]
    some = target.at(mass.squeeze(-1) > 0)
    assert (loss.per_slot(best, torch.zeros(len(best)).long(), some) == 0).all()


def test_terms_of_a_mixture_drop_what_each_of_them_lacks() -> None:
    mixture = MixedLoss(terms=[WeightedLoss(CrossEntropy(), 0.1), WeightedLoss(TotalVariation(), 0.9)])
    target, token_ids = random_targets(9), torch.arange(40) % V
    logits = torch.randn(40, N, dtype=torch.float64)
    of_tokens, of_targets, both = (
        over_draft_vocabulary(loss, VOCABULARY).per_slot(logits, token_ids, target)
        for loss in (CrossEntropy(), TotalVariation(), mixture)
    )
    torch.testing.assert_close(both, 0.1 * of_tokens + 0.9 * of_targets)
    assert (of_tokens[~torch.isin(token_ids, TOKENS)] == 0).all()


def test_sums_over_slots_in_chunks() -> None:
    """The loss projects with a head of N columns, and nothing else."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 6, dtype=torch.float64, requires_grad=True), torch.randn(N, 6).double()
    targets = SlotTargets(torch.arange(40) % V, random_targets(9), (torch.arange(40) % 3).double())
    totals, gradients = [], []
    for chunk_size in (40, 7):
        loss = over_draft_vocabulary(KullbackLeibler(chunk_size=chunk_size), VOCABULARY)
        total, count = loss(hidden, lambda states: F.linear(states, weight), targets)
        assert float(count) == float(targets.weights.sum())
        totals.append(total)
        gradients.append(torch.autograd.grad(total, hidden)[0])
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("order", ["vocabulary", "descending", "embedding"])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (0.7, 4), (1.0, None)])
def test_slots_distributions_are_those_of_a_model_without_the_other_tokens(
    temperature: float, top_k: int | None, order: str
) -> None:
    ranks = torch.randperm(V, generator=torch.Generator().manual_seed(0)) if order == "embedding" else None
    settings = SamplingConfig(temperature, top_k, 0.9, order)  # pyright: ignore[reportArgumentType]
    sampler = Sampler(settings, ranks, VOCABULARY)
    logits = torch.randn(6, N, generator=torch.Generator().manual_seed(1))
    found = sampler.for_student().distribution(logits)
    everywhere = torch.full((6, V), -torch.inf).index_copy(1, TOKENS, logits)
    expected = Sampler(settings, ranks).for_student().distribution(everywhere)
    kept = expected.probabilities > 0
    for row in range(6):
        own = found.probabilities[row] > 0
        assert found.token_ids is not None
        ids = torch.arange(V) if expected.token_ids is None else expected.token_ids[row]
        assert found.token_ids[row][own].tolist() == ids[kept[row]].tolist()
        torch.testing.assert_close(found.probabilities[row][own], expected.probabilities[row][kept[row]])
    verified = torch.randn(6, V)
    assert sampler.distribution(verified).probabilities.equal(Sampler(settings, ranks).distribution(verified)[0])


def test_counts_do_not_depend_on_the_order_of_texts() -> None:
    texts = [[5, 5, 9], [9, 3, 9], [3, 7]]
    expected = [3, 5, 9]
    assert most_frequent_tokens(texts, 3, V).tolist() == expected
    assert most_frequent_tokens(texts[::-1], 3, V).tolist() == expected
