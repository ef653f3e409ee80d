"""On a GPU: context positions stay the base model's, bit for bit."""

import copy

import pytest
import torch

from tests.helpers.tiny_gated_lora import CONTEXT, INPUT_IDS, SLOT_MASK, SLOTS, gated, logits
from tests.helpers.tiny_models import TINY_MODELS, cast_weights

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TINY_MODELS)
def test_context_logits_equal_the_base_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    base = cast_weights(TINY_MODELS[family](), dtype)
    model, gate = gated(copy.deepcopy(base))
    base, model, ids = base.to("cuda"), model.to("cuda"), INPUT_IDS.to("cuda")
    expected = logits(base, ids)
    assert torch.equal(logits(model, ids), expected)
    with gate.open(suffix=SLOTS):
        by_suffix = logits(model, ids)
    with gate.open(SLOT_MASK.to("cuda")):
        by_mask = logits(model, ids)
    for actual in (by_suffix, by_mask):
        assert actual.dtype == dtype
        assert torch.equal(actual[:, :CONTEXT], expected[:, :CONTEXT])
        assert (actual[:, CONTEXT:] != expected[:, CONTEXT:]).any(dim=-1).all()
