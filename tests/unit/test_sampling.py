"""Logits to distributions: ties, truncation, order, and what must not depend on the batch."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ptp_lightning.auxiliary import pick
from ptp_lightning.sampling import Order, Sampler, SamplingConfig, TokenDistribution
from ptp_lightning.token_ranking import rank_tokens

INF = math.inf
FLOAT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Few values, so that ties are the rule; both zeros, which count as equal; negative values, whose bits run backwards.
TIED_LOGITS = [-INF, -300.5, -2.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 300.5]


def over_vocabulary(P: TokenDistribution, vocabulary_size: int) -> Tensor:
    """The same probabilities `[..., V]` by token id."""
    if P.token_ids is None:
        return P.probabilities
    shape = (*P.probabilities.shape[:-1], vocabulary_size)
    return torch.zeros(shape, dtype=P.probabilities.dtype).scatter(-1, P.token_ids, P.probabilities)


def tie_free_logits(*shape: int) -> Tensor:
    """Every row is a permutation of evenly spaced values."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator).argsort(-1) * 0.37 - 3


@pytest.mark.parametrize("order", ["descending", "vocabulary"])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 40, 50])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_equals_the_warpers_of_transformers(temperature: float, top_k: int | None, top_p: float, order):
    for min_p in (None, 0.0, 0.02, 0.3, 1.0):
        compare_with_warpers(temperature, top_k, top_p, order, min_p)


def compare_with_warpers(temperature: float, top_k: int | None, top_p: float, order: Order, min_p: float | None):
    logits = tie_free_logits(20, 40)
    warped = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    if top_k is not None:
        warped = TopKLogitsWarper(top_k)(None, warped)  # type: ignore[arg-type]
    warped = TopPLogitsWarper(top_p)(None, warped)  # type: ignore[arg-type]
    if min_p is not None:
        warped = MinPLogitsWarper(min_p)(None, warped)  # type: ignore[arg-type]
    expected = warped.softmax(-1)

    P = SamplingConfig(temperature, top_k, top_p, order, min_p).distribution(logits)

    actual = over_vocabulary(P, 40)
    assert P.probabilities.shape[-1] == min(top_k or 40, 40)
    assert torch.equal(actual > 0, expected > 0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@given(
    rows=st.integers(1, 12).flatmap(
        lambda size: st.lists(st.lists(st.sampled_from(TIED_LOGITS), min_size=size, max_size=size), min_size=1)
    ),
    k=st.integers(1, 12),
    dtype=st.sampled_from(FLOAT_DTYPES),
)
@settings(deadline=None)
def test_rank_is_by_logit_then_lowest_id(rows: list[list[float]], k: int, dtype: torch.dtype):
    logits = torch.tensor(rows, dtype=dtype)
    k = min(k, logits.shape[-1])
    expected = [sorted(range(len(row)), key=lambda token: (-row[token], token))[:k] for row in logits.tolist()]
    assert rank_tokens(logits, k).tolist() == expected


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rank_in_a_large_vocabulary(dtype: torch.dtype):
    logits = (torch.randn(3, 150_000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[0, [149_999, 70_000, 7]] = 60.0  # a tie at the top whose ids need more than 16 bits
    expected = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :50]
    assert expected[0, :3].tolist() == [7, 70_000, 149_999]
    assert torch.equal(rank_tokens(logits, 50), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_more_ties_than_spare_tokens(dtype: torch.dtype):
    """Rows whose k-th value goes on beyond the tokens that are listed, beside rows where it does not."""
    logits = torch.zeros(3, 500, dtype=dtype)
    logits[0, [400, 30]] = 2.0
    logits[1] = torch.arange(500.0)
    logits[2, 100:] = -1.0
    assert rank_tokens(logits, 20)[0].tolist() == [30, 400, *range(18)]
    assert torch.equal(rank_tokens(logits, 20), logits.sort(dim=-1, descending=True, stable=True).indices[:, :20])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ties_are_resolved_by_the_lowest_id(dtype: torch.dtype):
    logits = torch.tensor([1.0, 5.0, 1.0, 5.0, 1.0], dtype=dtype)
    P = SamplingConfig(top_k=3, order="descending").distribution(logits)
    assert P.token_ids is not None
    assert P.token_ids.tolist() == [1, 3, 0]
    # Two equal tokens hold half of the mass each: the second is not needed for top_p = 0.5, and is for a bit more.
    halves = torch.tensor([-INF, 2.0, 2.0], dtype=dtype)
    assert SamplingConfig(top_p=0.5, order="vocabulary").distribution(halves).probabilities.tolist() == [0, 1, 0]
    assert SamplingConfig(top_p=0.51, order="vocabulary").distribution(halves).probabilities.tolist() == [0, 0.5, 0.5]


def test_orders_list_the_same_tokens_differently():
    logits = torch.tensor([0.25, 0.0, 0.125, 0.625]).log()
    descending = SamplingConfig(top_k=3, order="descending").distribution(logits)
    vocabulary = SamplingConfig(top_k=3, order="vocabulary").distribution(logits)
    assert descending.token_ids is not None
    assert vocabulary.token_ids is not None
    assert descending.token_ids.tolist() == [3, 0, 2]
    assert vocabulary.token_ids.tolist() == [0, 2, 3]
    torch.testing.assert_close(descending.probabilities, torch.tensor([0.625, 0.25, 0.125]))
    torch.testing.assert_close(vocabulary.probabilities, torch.tensor([0.25, 0.125, 0.625]))


@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize("top_p", [0.99, 1.0])
def test_embedding_order_runs_through_the_given_ranks(top_k: int | None, top_p: float):
    logits = torch.tensor([0.25, 0.001, 0.125, 0.624]).log()
    sampler = Sampler(SamplingConfig(top_k=top_k, top_p=top_p, order="embedding"), torch.tensor([2, 1, 3, 0]))
    P = sampler.distribution(logits)
    assert P.token_ids is not None
    assert P.token_ids.tolist() == [3, 0, 2] if top_k else [3, 1, 0, 2]
    kept = P.probabilities[P.probabilities > 0]
    weights = torch.tensor([0.624, 0.25, 0.125] if len(kept) == 3 else [0.624, 0.001, 0.25, 0.125])
    assert len(kept) == (4 if top_k is None and top_p == 1 else 3)
    torch.testing.assert_close(kept, weights / weights.sum())


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 0.9), (None, 0.9), (50, 1.0), (None, 1.0)])
def test_embedding_order_is_vocabulary_order_after_renaming_the_tokens(top_k: int | None, top_p: float):
    logits = tie_free_logits(3, 5, 60)
    ranks = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    found = Sampler(SamplingConfig(0.7, top_k, top_p, "embedding"), ranks).distribution(logits)
    renamed = SamplingConfig(0.7, top_k, top_p, "vocabulary").distribution(logits[..., ranks.argsort()])
    torch.testing.assert_close(found.probabilities, renamed.probabilities)
    by_rank = torch.arange(60).expand(3, 5, 60) if renamed.token_ids is None else renamed.token_ids
    assert found.token_ids is not None
    assert torch.equal(ranks[found.token_ids], by_rank)


@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize(("ranks", "found"), [(None, "none"), (torch.arange(5), "5 ranks")])
def test_embedding_order_without_its_ranks_raises(ranks: Tensor | None, found: str, top_k: int | None, top_p: float):
    sampler = Sampler(SamplingConfig(top_k=top_k, top_p=top_p, order="embedding"), ranks)
    for apply in (sampler.distribution, sampler.teacher_and_target):
        with pytest.raises(ValueError, match=f"needs the ranks of 4 tokens, found {found}:.*sampling.order"):
            apply(tie_free_logits(2, 4))


@pytest.mark.parametrize("order", ["descending", "vocabulary", "embedding"])
def test_only_greedy_slots_carry_another_u(order: Order):
    u = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert SamplingConfig(0.7, order=order).slot_auxiliaries(u) is u
    assert SamplingConfig(0.0, order=order).slot_auxiliaries(u).tolist() == [0.0 if order == "descending" else 0.5] * 2


@pytest.mark.parametrize("top_p", [0.6, 1.0])
@pytest.mark.parametrize("top_k", [None, 4, 5])
def test_vocabulary_order_without_top_k_needs_no_ids(top_k: int | None, top_p: float):
    P = SamplingConfig(top_k=top_k, top_p=top_p, order="vocabulary").distribution(tie_free_logits(2, 4))
    assert P.token_ids is None


def test_a_top_k_beyond_the_vocabulary_keeps_all():
    logits = tie_free_logits(2, 4)
    beyond, none = (SamplingConfig(top_k=top_k, order="descending").distribution(logits) for top_k in (50, None))
    assert beyond.token_ids is not None
    assert none.token_ids is not None
    assert torch.equal(beyond.probabilities, none.probabilities)
    assert torch.equal(beyond.token_ids, none.token_ids)


@pytest.mark.parametrize("order", ["descending", "vocabulary"])
@pytest.mark.parametrize(("row", "expected"), [([1, 3, 3], 1), ([-0.0, 0.0, -1], 0), ([-INF, -7, -INF], 1), ([4], 0)])
def test_greedy_is_the_first_of_the_largest(row: list[float], expected: int, order):
    P = SamplingConfig(temperature=0, top_k=2, top_p=0.1, order=order).distribution(torch.tensor([row, row]))
    assert P.token_ids is not None
    assert P.token_ids.tolist() == [[expected]] * 2
    assert P.probabilities.tolist() == [[1.0]] * 2


def test_a_masked_token_has_probability_zero():
    logits = torch.tensor([-INF, 0.0, -INF, 0.0])
    P = SamplingConfig(top_k=3, order="descending").distribution(logits)
    assert P.probabilities.tolist() == [0.5, 0.5, 0]
    assert SamplingConfig(order="vocabulary").distribution(logits).probabilities.tolist() == [0, 0.5, 0, 0.5]


def test_a_low_temperature_does_not_overflow():
    P = SamplingConfig(temperature=1e-6).distribution(torch.tensor([1e35, 0.0, -1e35]))
    assert P.probabilities.tolist() == [1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("order", ["descending", "vocabulary"])
@pytest.mark.parametrize(
    ("row", "found"), [([0, math.nan], "nan"), ([math.nan, INF], "nan"), ([0, INF], "inf"), ([-INF, -INF], "-inf")]
)
def test_broken_logits_raise(row: list[float], found: str, temperature: float, order):
    logits = torch.tensor([[[0.0, 1.0]], [row]])
    with pytest.raises(ValueError, match=rf"must be finite.*trainer\.precision.*; found {found} \(1 of 2\)$"):
        SamplingConfig(temperature, order=order).distribution(logits)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("order", ["descending", "vocabulary"])
@pytest.mark.parametrize(("top_k", "top_p"), [(50, 0.9), (None, 0.9), (50, 1.0), (None, 1.0)])
def test_a_row_does_not_depend_on_its_batch(top_k: int | None, top_p: float, order, dtype: torch.dtype):
    logits = (torch.randn(3, 5, 2051, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    config = SamplingConfig(0.7, top_k, top_p, order)
    batch = config.distribution(logits)
    for i, j in ((0, 0), (1, 3), (2, 4)):
        for alone, row in ((logits[i, j], ...), (logits[i, j][None], 0), (logits[:, j], i)):
            P = config.distribution(alone)
            assert torch.equal(P.probabilities[row], batch.probabilities[i, j])
            assert torch.equal(P.cdf()[row], batch.cdf()[i, j])
            if P.token_ids is not None and batch.token_ids is not None:
                assert torch.equal(P.token_ids[row], batch.token_ids[i, j])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(0.0), SamplingConfig(top_p=0.9)])
def test_dtype_and_input_are_kept(config: SamplingConfig, dtype: torch.dtype):
    logits = tie_free_logits(2, 9).to(dtype)
    before = logits.clone()
    probabilities = config.distribution(logits).probabilities
    assert probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(logits, before)


def test_low_precision_logits_are_computed_in_float32():
    logits = tie_free_logits(5, 30).bfloat16()
    config = SamplingConfig(0.7, 20, 0.9)
    assert torch.equal(config.distribution(logits).probabilities, config.distribution(logits.float()).probabilities)


@pytest.mark.parametrize("order", ["descending", "vocabulary"])
def test_gradients_reach_the_logits(order):
    config = SamplingConfig(0.7, top_k=4, top_p=0.8, order=order)
    logits = tie_free_logits(2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: config.distribution(x).probabilities, logits)


def test_cdf_ends_at_exactly_one_and_leaves_probabilities_alone():
    for dtype in (torch.float32, torch.float64):
        probabilities = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.7, 0.0], dtype=dtype)
        before = probabilities.clone()
        F = TokenDistribution(probabilities).cdf()
        assert F.dtype == torch.float64
        assert F[0] == 0
        assert F[1] == F[2]
        assert F[4] == F[5] == 1
        torch.testing.assert_close(F, before.double().cumsum(-1), rtol=0, atol=1e-7)
        assert torch.equal(probabilities, before)


def test_zeros_in_between_do_not_change_the_cdf():
    probabilities = torch.randn(1000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    spread = torch.stack([torch.zeros(1000), probabilities], -1).flatten()
    assert torch.equal(TokenDistribution(spread).cdf()[1::2], TokenDistribution(probabilities).cdf())


def test_probability_of():
    probabilities = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.25, 0.25]])
    listed = TokenDistribution(probabilities, torch.tensor([[4, 0, 2], [1, 5, 3]]))
    assert listed.probability_of(torch.tensor([0, 3])).tolist() == pytest.approx([0.3, 0.25])
    assert listed.probability_of(torch.tensor([1, 0])).tolist() == [0, 0]
    assert TokenDistribution(probabilities).probability_of(torch.tensor([0, 2])).tolist() == pytest.approx([0.7, 0.25])
    assert TokenDistribution(probabilities).probability_of(torch.tensor([-1, 3])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", INF),
        ("temperature", math.nan),
        ("temperature", 1e-9),
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("order", "ascending"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INF),
        ("no_repeat_ngram_size", -1),
    ],
)
def test_a_setting_out_of_range_names_its_key(key: str, value: object):
    with pytest.raises(ValueError, match=rf"^{key} must .*found .*{value}"):
        SamplingConfig(**{key: value})  # type: ignore[arg-type]


def test_targets_leave_top_p_to_drafts_and_drafts_leave_the_temperature_to_targets():
    assert SamplingConfig(0.7, min_p=0.1).target() == SamplingConfig(0.7)
    assert SamplingConfig(0.7, min_p=0.1).for_student() == SamplingConfig(min_p=0.1)
    assert SamplingConfig(0.7, 50, 0.9, "descending").target() == SamplingConfig(0.7, 50, 1.0, "descending")
    assert SamplingConfig(0.7, 50, 0.9, "descending").for_student() == SamplingConfig(1.0, 50, 0.9, "descending")
    assert SamplingConfig(0.0, 50, 0.9).for_student() == SamplingConfig(0.0, 50, 0.9)


@pytest.mark.parametrize("order", ["descending", "vocabulary", "embedding"])
def test_a_student_that_meets_its_target_drafts_what_the_teacher_picks(order: Order) -> None:
    """Students learn the distribution before top-p; drafts apply top-p, and must exclude the same tokens."""
    config = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, order=order)
    ranks = torch.randperm(300, generator=torch.Generator().manual_seed(2)) if order == "embedding" else None
    sampling = Sampler(config, ranks)
    logits = 3 * torch.randn(500, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher, target = sampling.teacher_and_target(logits)
    assert all(map(torch.equal, teacher, sampling.distribution(logits)))  # pyright: ignore
    assert all(map(torch.equal, target, replace(sampling, settings=config.target()).distribution(logits)))  # pyright: ignore
    assert (teacher.probabilities > 0).sum() < (target.probabilities > 0).sum() == 500 * 50

    student = torch.full_like(logits, -torch.inf).scatter(-1, target.token_ids, target.probabilities.log())  # pyright: ignore
    draft = sampling.for_student().distribution(student)
    torch.testing.assert_close(draft.probabilities, teacher.probabilities)
    u = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(pick(u, draft), pick(u, teacher))
