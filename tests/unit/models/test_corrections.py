"""What every correction promises, one row each; and the formulas of the heads."""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptp_lightning.auxiliary import pick
from ptp_lightning.models import (
    CategoricalObjective,
    DecoderRefiner,
    IndependentObjective,
    MarkovHead,
    PredictorConfig,
    PredictorNetwork,
    TokenConditionedHead,
)
from ptp_lightning.models.correction.correction import Correction, HeadCorrection
from ptp_lightning.models.correction.markov_head import MarkovModule
from ptp_lightning.models.correction.token_conditioned_head import TokenConditionedModule
from ptp_lightning.testing import check_correction
from ptp_lightning.training.windows.student_draft import student_draft
from tests.helpers.tiny_predictors import CORRECTIONS, tiny_predictor
from tests.helpers.tiny_windows import DOCUMENT_IDS, WINDOW_STARTS, make_batch

VOCAB_SIZE, WINDOW_LENGTH, NUM_SLOTS = 48, 5, 4
HEADS = {name: correction for name, correction in CORRECTIONS.items() if isinstance(correction, HeadCorrection)}

every_correction = pytest.mark.parametrize("name", CORRECTIONS)
every_head = pytest.mark.parametrize("name", HEADS)


@cache
def predictor_with(correction: Correction, draft_vocabulary: bool = False) -> PredictorNetwork:
    tokens = tuple(range(0, VOCAB_SIZE, 2)) if draft_vocabulary else None
    return tiny_predictor(
        correction=correction, draft_vocabulary=tokens, window_length=WINDOW_LENGTH, vocab_size=VOCAB_SIZE
    )


@cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids `[B, S]`, auxiliaries `[B, N, L]` and the tokens `[B, N, L - 1]` that slots stand for."""
    generator = torch.Generator().manual_seed(0)
    shape = (*WINDOW_STARTS.shape, WINDOW_LENGTH)
    input_ids = torch.randint(VOCAB_SIZE, DOCUMENT_IDS.shape, generator=generator)
    auxiliaries = torch.rand(shape, generator=generator, dtype=torch.float64)
    return input_ids, auxiliaries, torch.randint(VOCAB_SIZE, shape, generator=generator)[..., :-1]


@every_correction
class TestContract:
    def test_contract(self, name: str) -> None:
        check_correction(CORRECTIONS[name])

    def test_its_public_name_is_stored(self, name: str) -> None:
        plain = PredictorConfig(correction=CORRECTIONS[name]).to_dict()
        assert plain["correction"]["class_path"] == f"ptp_lightning.models.{type(CORRECTIONS[name]).__name__}"

    def test_only_a_refiner_reads_the_context(self, name: str) -> None:
        predictor = predictor_with(CORRECTIONS[name])
        pairs = predictor.correction_context(predictor.encode(make_batch(inputs()[0])))
        assert (pairs is None) == (name in HEADS)


@every_head
@torch.no_grad()
def test_a_draft_is_the_same_in_parallel_and_from_left_to_right(name: str) -> None:
    """As many steps as slots settle every token, in either order."""
    correction = HEADS[name]
    input_ids, auxiliaries, _ = inputs()
    predictor = predictor_with(correction, draft_vocabulary=True)
    context = predictor.encode(make_batch(input_ids))
    first = pick(auxiliaries[..., 0], context.sampling.distribution(predictor.logits(context.first_hidden)))
    drafts = []
    before = predictor.config
    for order in ("left_to_right", "parallel"):
        values = {"order": order, "num_refinement_steps": NUM_SLOTS}
        own = type(correction)(**{**vars(correction), **values})
        predictor.config = PredictorConfig(**{**vars(before), "correction": own})
        drafts.append(student_draft(predictor, context, auxiliaries, first).token_ids)
    predictor.config = before
    assert torch.equal(*drafts)
    assert (drafts[0][..., 1:] % 2 == 0).all() and (drafts[0][..., 0] % 2 == 1).any()


@torch.no_grad()
def test_the_formula_of_the_token_conditioned_head() -> None:
    generator = torch.Generator().manual_seed(0)
    head = TokenConditionedModule(hidden_size=6, intermediate_size=3).double()
    head.down.weight.normal_(generator=generator)
    h, e = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    inner = torch.cat([rms(h), rms(e)], dim=-1) @ head.up.weight.T
    expected = h + (inner * inner.sigmoid()) @ head.down.weight.T
    torch.testing.assert_close(head(h, e), expected)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == {
        "up.weight": (3, 12),
        "down.weight": (6, 3),
    }


def test_a_markov_head_learns_bigrams() -> None:
    """Without help of the hidden states: a permutation of tokens, which needs full rank."""
    torch.manual_seed(0)
    embeddings = torch.randn(8, 16)
    head = MarkovModule(hidden_size=16, num_logits=8, rank=8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    after = torch.randperm(8)
    for _ in range(60):
        features = head(torch.zeros(8, 16), embeddings)[:, 16:]
        loss = F.cross_entropy(head.logit_bias(features), after)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert torch.equal(head.logit_bias(head(torch.zeros(8, 16), embeddings)[:, 16:]).argmax(-1), after)


class TestRefusals:
    @pytest.mark.parametrize("head", [TokenConditionedHead, MarkovHead])
    def test_of_heads(self, head: type[HeadCorrection]) -> None:
        with pytest.raises(ValueError, match=r"correction.init_args.order left_to_right or parallel, found 'back'"):
            head(order="back")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"correction.init_args.num_refinement_steps >= 1, found 0"):
            head(num_refinement_steps=0)

    def test_of_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"correction.init_args.intermediate_size >= 1, found 0"):
            TokenConditionedHead(0)
        with pytest.raises(ValueError, match=r"correction.init_args.rank >= 1, found 0"):
            MarkovHead(0)

    def test_of_an_objective_that_ignores_the_draft(self) -> None:
        """A refiner may run on states alone."""
        assert PredictorConfig(objective=IndependentObjective(), correction=DecoderRefiner()).correction is not None
        with pytest.raises(ValueError, match=r"beside predictor.correction MarkovHead, .* found IndependentObjective"):
            PredictorConfig(objective=IndependentObjective(), correction=MarkovHead())
        assert PredictorConfig(objective=CategoricalObjective(), correction=MarkovHead()).correction is not None
