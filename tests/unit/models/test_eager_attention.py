"""Eager attention of models without SDPA: capped scores and attention sinks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ptp_lightning.decoding.transformers_generate import generate_with_folder
from ptp_lightning.export.model_folder import save_with_base_model
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.models.attention import eager_attention
from ptp_lightning.models.attention.eager_attention import (
    attend_eagerly,
    attend_in_float64,
    needs_eager_attention,
    register_eager_attention,
)
from ptp_lightning.models.backbone import load_backbone
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_families import build_family, family_config

KINDS: dict[str, dict[str, Any]] = {"gemma2": {"attn_logit_softcapping": 0.5}, "gpt_oss": {}}


def attended(scores: list[float], values: list[float], mask: Tensor | None = None, **options: Any) -> float:
    """What one query sees, whose score of key k is `scores[k]`."""
    query, keys = torch.ones(1, 1, 1, 1), torch.tensor(scores).view(1, 1, -1, 1)
    found, _ = attend_in_float64(
        nn.Module(), query, keys, torch.tensor(values).view(1, 1, -1, 1), mask, scaling=1.0, **options
    )
    assert found.shape == (1, 1, 1, 1) and found.dtype == query.dtype
    return found.item()


class TestByHand:
    def test_a_sink_takes_probability_from_all_keys(self) -> None:
        assert attended([0.0, 0.0], [3.0, 6.0]) == pytest.approx(4.5)
        assert attended([0.0, 0.0], [3.0, 6.0], s_aux=torch.zeros(1)) == pytest.approx(3.0)  # a third each
        assert attended([0.0], [8.0], s_aux=torch.tensor([math.log(3)])) == pytest.approx(2.0)

    def test_scores_are_capped_before_the_mask(self) -> None:
        # 2 tanh(s / 2) = log 3 at s = 2 atanh(log 3 / 2): the second key gets three times the weight of the first.
        score = 2 * math.atanh(math.log(3) / 2)
        assert attended([0.0, score], [0.0, 4.0], softcap=2.0) == pytest.approx(3.0)
        seen = torch.tensor([True, False, True]).view(1, 1, 1, 3)
        assert attended([0.0, 50.0, score], [0.0, 9.0, 4.0], seen, softcap=2.0) == pytest.approx(3.0)

    def test_heads_share_keys_in_groups(self) -> None:
        values = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
        found, _ = attend_in_float64(nn.Module(), torch.ones(1, 4, 1, 1), torch.ones(1, 2, 1, 1), values, None)
        assert found.flatten().tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_functions_compute_what_the_model_does(kind: str) -> None:
    model: Any = build_family(family_config(kind) | KINDS[kind])
    assert needs_eager_attention(model)
    ids = torch.arange(3, 40).unsqueeze(0)
    expected = model(ids).logits
    model.set_attn_implementation(register_eager_attention())
    assert torch.equal(model(ids).logits, expected)
    model.set_attn_implementation(register_eager_attention(in_float64=True))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_boolean_masks_are_those_that_are_added(kind: str) -> None:
    model: Any = build_family(family_config(kind) | KINDS[kind])
    attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    options = {"scaling": 0.5, "softcap": getattr(attention, "attn_logit_softcapping", None)}
    options["s_aux"] = getattr(attention, "sinks", None)
    with torch.no_grad():
        first, _ = attend_eagerly(attention, query, key, value, seen, **options)
        assert torch.equal(first, attend_eagerly(attention, query, key, value, added, **options)[0])
        for mask in (seen, added):
            in_float64, _ = attend_in_float64(attention, query, key, value, mask, **options)
            torch.testing.assert_close(in_float64, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "ignored"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_attention_of_which_decoding_computes_a_part_is_refused(
    kind: str, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model would be whose own function reads what ours does not know."""
    plain = attend_in_float64
    monkeypatch.setattr(
        eager_attention, "attend_in_float64", lambda *args, **more: plain(*args, **more | {ignored: None})
    )
    base = build_family(family_config(kind) | KINDS[kind])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    with pytest.raises(ValueError, match=f"expected the logits of the base model .{kind}., found others"):
        PredictorNetwork(
            PredictorConfig(BackboneSettings(path="unused"), lora=LoraSettings(rank=2, target_modules=targets)), base
        )


def test_folders_are_opened_or_refused_by_their_model(tmp_path: Path) -> None:
    """Opened with the attention of the model; a family that cannot be run is named, not its file."""
    for kind in ("gemma2", "bloom"):
        config = AutoConfig.for_model(**family_config(kind))
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    assert needs_eager_attention(load_backbone(BackboneSettings(str(tmp_path / "gemma2"))))
    with pytest.raises(ValueError, match="^expected a model with SDPA attention, found BloomForCausalLM without"):
        load_backbone(BackboneSettings(str(tmp_path / "bloom")))


def test_a_folder_with_base_model_generates(tmp_path: Path) -> None:
    build_family(family_config("gemma2") | KINDS["gemma2"]).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    backbone = BackboneSettings(str(tmp_path / "base"))
    network = PredictorNetwork(PredictorConfig(backbone, lora=LoraSettings(2), window_length=4))
    save_with_base_model(network.eval(), tmp_path / "whole")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    prompt = torch.arange(3, 23).unsqueeze(0)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    assert torch.equal(generate_with_folder(model, prompt, **options), expected)
    assert torch.equal(model.generate(prompt, **options), expected)
