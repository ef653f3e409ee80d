"""Near-ties are distinguished from wrong tokens."""

from typing import Any

import pytest
import torch

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding import GenerationSettings
from ptp_lightning.evaluation import near_ties
from ptp_lightning.evaluation.near_ties import first_difference, is_explained_by_rounding, is_near_tie
from ptp_lightning.sampling import Sampler, SamplingConfig
from tests.helpers.tiny_decoding import PROMPT, reference
from tests.helpers.tiny_predictors import tiny_predictor

VOCABULARY = 32
ROUNDING = 1e-3


@pytest.mark.parametrize(
    ("text", "other", "position"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 9, 3], [1, 2, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0), ([], [], None)],
)
def test_first_difference(text: list[int], other: list[int], position: int | None) -> None:
    assert first_difference(text, other) == position


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(), SamplingConfig(0.7, top_k=5, top_p=0.9), SamplingConfig(order="descending")],
    ids=["plain", "cut", "descending"],
)
def test_only_tokens_that_a_small_change_picks_are_near_ties(sampling: SamplingConfig) -> None:
    """Logits are changed by less and by more than the rounding."""
    generator = torch.Generator().manual_seed(3)
    sampler = Sampler(sampling, None)
    near = far = 0
    for _ in range(20):
        logits = 2 * torch.randn(VOCABULARY, generator=generator)
        u = torch.rand((), generator=generator, dtype=torch.float64)
        token_id = int(pick(u, sampler.distribution(logits)))
        moved = logits + ROUNDING * (torch.randint(0, 2, (VOCABULARY,), generator=generator) * 2.0 - 1)
        assert is_near_tie(moved, u, token_id, sampler, 2 * ROUNDING)
        near += 1
        others = [k for k in range(VOCABULARY) if k != token_id]
        far += sum(is_near_tie(logits, u, other, sampler, ROUNDING) for other in others[::8])
    assert near == 20
    assert far <= 2


def test_a_boundary_between_two_tokens_is_a_near_tie_for_both() -> None:
    logits = torch.log(torch.tensor([0.25, 0.25, 0.5]))
    u = torch.tensor(0.25 + 1e-6, dtype=torch.float64)
    sampler = Sampler(SamplingConfig(), None)
    assert [is_near_tie(logits, u, token_id, sampler, 1e-4) for token_id in range(3)] == [True, True, False]
    assert [is_near_tie(logits, u, token_id, sampler, 1e-7) for token_id in range(3)] == [False, True, False]


def test_the_threshold_of_top_k_can_be_a_near_tie() -> None:
    logits = torch.tensor([0.0, 3.0, 0.00001, 2.0])
    sampler = Sampler(SamplingConfig(top_k=3), None)
    u = torch.tensor(0.001, dtype=torch.float64)
    assert int(pick(u, sampler.distribution(logits))) == 1  # token 0 is cut off
    assert is_near_tie(logits, u, 0, sampler, 1e-4)
    assert not is_near_tie(logits, u, 0, sampler, 1e-6)


def test_rounding_explains_the_reference_and_no_other_token() -> None:
    predictor = tiny_predictor(vocab_size=VOCABULARY)
    settings = GenerationSettings(max_new_tokens=8)
    text = reference(predictor, settings)
    for position, token_id in enumerate(text):
        assert is_explained_by_rounding(predictor, PROMPT, text, position, token_id, settings)
        other = (token_id + 16) % VOCABULARY
        assert not is_explained_by_rounding(predictor, PROMPT, text, position, other, settings)


def test_differences_between_calls_of_different_shapes_are_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a device that sums in a different order if a token is read alone."""
    predictor = tiny_predictor(vocab_size=VOCABULARY)
    settings = GenerationSettings(max_new_tokens=8)
    text = reference(predictor, settings)
    plain = near_ties._logits

    def explained(shift: float) -> list[bool]:
        def logits(*arguments: Any) -> torch.Tensor:
            num_read_before = arguments[3]
            return plain(*arguments) + (shift if num_read_before else 0.0) * torch.arange(VOCABULARY)

        monkeypatch.setattr(near_ties, "_logits", logits)
        others = [(token_id + 1) % VOCABULARY for token_id in text]
        return [
            is_explained_by_rounding(predictor, PROMPT, text, position, other, settings)
            for position, other in enumerate(others)
        ]

    assert not any(explained(0.0))
    assert all(explained(1.0))


@torch.inference_mode()
def test_logits_of_calls_of_all_shapes_are_those_after_the_text() -> None:
    """Of a text that is long enough for decoders to read it in one piece."""
    network, token_ids = tiny_predictor(), [3, 5, 7, 2, 9] * 12
    expected = network.base_model(torch.tensor([token_ids])).logits[0, -1]
    for num_read_before, num_fillers in ((0, 0), (len(token_ids) - 1, 0), (0, 4)):
        found = near_ties._logits(network, token_ids, GenerationSettings(), num_read_before, num_fillers)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
