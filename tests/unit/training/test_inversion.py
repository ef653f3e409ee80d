"""The auxiliaries of given tokens: they decode back to them, equal a plain loop's, and cost what is promised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ptp_lightning.auxiliary import pick, token_interval
from ptp_lightning.auxiliary_strategies import UniformInInterval
from ptp_lightning.batch import PackedBatch
from ptp_lightning.models import (
    PredictorNetwork,
)
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training.modules.inversion import InverseAuxiliaries, invert
from ptp_lightning.training.windows.dataset_windows import window_tokens
from tests.helpers.parameter_products import one_in
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.tiny_shared_students import (
    FULL,
    LENGTH,
    TRUNCATED,
    count_calls,
    make_batch,
    make_predictor,
)

SAMPLING = {"full": FULL, "truncated": TRUNCATED}


def inverted(predictor: PredictorNetwork, batch: PackedBatch, seed: int = 0) -> InverseAuxiliaries:
    token_ids, _ = window_tokens(batch, LENGTH)
    generator = torch.Generator().manual_seed(seed)
    return invert(predictor, predictor.encode(batch), token_ids, UniformInInterval(), generator)


@torch.no_grad()
def picked(predictor: PredictorNetwork, batch: PackedBatch, values: Tensor) -> Tensor:
    """`[B, N, L - 1]`, what the auxiliaries pick from the distributions of one parallel pass."""
    context = predictor.encode(batch)
    slots = predictor.slot_hidden(context, F.pad(values, (0, 1)))
    hidden = torch.cat([context.first_hidden.unsqueeze(2), slots[:, :, :-1]], dim=2)
    return pick(values, predictor.config.sampling.distribution(predictor.slot_logits(hidden)))


def loop(predictor: PredictorNetwork, batch: PackedBatch, seed: int) -> InverseAuxiliaries:
    """Algorithm 3 window by window: a whole pass over context and slots for every token, without cache or packing."""
    token_ids, _ = window_tokens(batch, LENGTH)
    generator = torch.Generator().manual_seed(seed)
    shape = batch.window_starts.shape
    r = torch.stack([torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(LENGTH - 1)], dim=-1)
    values, found = torch.zeros_like(r), torch.zeros_like(r, dtype=torch.bool)
    model = predictor.base_model
    for row, window in [(row, window) for row in range(shape[0]) for window in range(shape[1])]:
        start = int(batch.window_starts[row, window])
        begin = start - 1 - int(batch.position_ids[row, start - 1])
        embeddings = model.get_input_embeddings()(batch.input_ids[row : row + 1, begin:start])
        for position in range(LENGTH - 1):
            if position > 0:
                (known,) = predictor.slot_encoder.embeddings
                slot = predictor.slot_encoder.placeholder + known(values[row, window, position - 1])
                embeddings = torch.cat([embeddings, slot.view(1, 1, -1)], dim=1)
            logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
            P = predictor.config.sampling.distribution(logits)
            lower, upper = token_interval(P, token_ids[row, window, position])
            values[row, window, position] = torch.minimum(
                lower + r[row, window, position] * (upper - lower), upper.nextafter(lower)
            )
            found[row, window, position] = upper > lower
    return InverseAuxiliaries(values, found)


class TestInvert:
    @one_in(2, family=TINY_MODELS, sampling=["full", "truncated"])
    @torch.no_grad()
    def test_equals_a_loop_over_windows(self, family: str, sampling: str) -> None:
        predictor, batch = make_predictor(family, SAMPLING[sampling]), make_batch()
        expected, result = loop(predictor, batch, seed=3), inverted(predictor, batch, seed=3)
        assert torch.equal(result.found, expected.found) and result.found.any()
        torch.testing.assert_close(result.values, expected.values, atol=1e-5, rtol=0)  # rotary angles are float32

    @one_in(2, family=TINY_MODELS, sampling=["full", "truncated"])
    def test_auxiliaries_decode_back_to_the_data(self, family: str, sampling: str) -> None:
        """In float64 the cached steps and the parallel pass differ by far less than a draw from its interval's end."""
        predictor = make_predictor(family, SAMPLING[sampling])
        for seed in range(20):
            batch = make_batch(seed)
            result = inverted(predictor, batch, seed)
            token_ids, _ = window_tokens(batch, LENGTH)
            assert torch.equal(picked(predictor, batch, result.values)[result.found], token_ids[..., :-1][result.found])
            assert ((result.values >= 0) & (result.values < 1)).all()

    def test_single_precision_decodes_back_but_for_near_ties(self) -> None:
        """Where it does not, the draw lies closer to the end of its interval than single precision can tell.

        Of 48,000 tokens of these networks one did not.
        """
        predictor, exact = make_predictor(dtype=torch.float32), make_predictor()
        num_tokens = num_wrong = 0
        for seed in range(60):
            batch = make_batch(seed)
            values = inverted(predictor, batch, seed).values
            token_ids = window_tokens(batch, LENGTH)[0][..., :-1]
            wrong = picked(predictor, batch, values) != token_ids
            num_tokens, num_wrong = num_tokens + wrong.numel(), num_wrong + int(wrong.sum())
            nearby = torch.stack([picked(exact, batch, (values + d).clamp(0, 1 - 1e-9)) for d in (-1e-5, 0.0, 1e-5)])
            assert (nearby == token_ids).any(0)[wrong].all()
        assert num_tokens == 60 * 24 and num_wrong <= 2

    def test_a_token_without_probability_ends_the_window(self) -> None:
        """Greedy truncation: of 30 tokens only the likeliest has an interval."""
        predictor = make_predictor(sampling=SamplingConfig(top_k=1))
        result = inverted(predictor, make_batch())
        assert not result.found.all()
        assert torch.equal(result.values[~result.found], torch.zeros(int((~result.found).sum())).double())

    def test_cost_in_calls_and_positions(self) -> None:
        """L - 2 calls of one slot per window; the context is not read again."""
        predictor, batch = make_predictor(), make_batch()
        context, token_ids = predictor.encode(batch), window_tokens(batch, LENGTH)[0]
        calls = count_calls(predictor)
        invert(predictor, context, token_ids, UniformInInterval(), torch.Generator().manual_seed(0))
        assert calls() == [3] * (LENGTH - 2)

    def test_leaves_context_and_graph_alone(self) -> None:
        predictor, batch = make_predictor(), make_batch()
        context = predictor.encode(batch)
        before = [layer.keys for layer in context.cache.layers]  # pyright: ignore
        result = invert(
            predictor, context, window_tokens(batch, LENGTH)[0], UniformInInterval(), torch.Generator().manual_seed(0)
        )
        assert not result.values.requires_grad
        assert all(layer.keys is kept for layer, kept in zip(context.cache.layers, before, strict=True))  # pyright: ignore
        assert all(keys.requires_grad for keys in before)

    def test_same_generator_same_auxiliaries(self) -> None:
        first, again, other = (inverted(make_predictor(), make_batch(), seed).values for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
