"""What slots get is exchanged, and nothing else: the text and the picks keep their u."""

from benchmarks.use_of_auxiliaries import correct_tokens
from ptp_lightning.decoding import GenerationSettings
from ptp_lightning.evaluation.acceptance_gap import correct_tokens_at_all_positions
from tests.helpers.tiny_predictors import tiny_predictor

PROMPT = [3, 1, 4]
SETTINGS = GenerationSettings(max_new_tokens=16, window_length=4)


def test_independent_slots_carry_no_u() -> None:
    predictor = tiny_predictor(objective="independent", correction=None)
    own, other, constant = correct_tokens(predictor, PROMPT, SETTINGS).values()
    assert own == other == constant


def test_categorical_slots_draft_other_tokens_without_their_u() -> None:
    predictor = tiny_predictor(objective="categorical", correction=None)
    text = [5, 6, 7, 8, 9, 1, 2, 3]
    before = correct_tokens_at_all_positions(predictor, PROMPT, text, SETTINGS)
    own, other, _ = correct_tokens(predictor, PROMPT, SETTINGS).values()
    assert own != other
    assert correct_tokens_at_all_positions(predictor, PROMPT, text, SETTINGS) == before, "slots get their own u again"
