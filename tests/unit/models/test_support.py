"""Base models that this package would run otherwise than they run themselves are refused when they are loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ptp_lightning import PackedBatch
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork, support
from ptp_lightning.models.attention import dispatch
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.models.lora.gated_lora import ALL_LINEAR
from tests.helpers.tiny_families import build_family, family_config
from tests.helpers.tiny_models import tiny_family

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build(base: PreTrainedModel, target_modules: Any = ALL_LINEAR) -> PredictorNetwork:
    lora = LoraSettings(rank=2, target_modules=target_modules)
    return PredictorNetwork(PredictorConfig(BackboneSettings(path="unused"), lora=lora, window_length=4), base)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma3_text", {"final_logit_softcapping": 0.5, "head_dim": 16, "sliding_window": 4}),
    ],
)
def test_scaled_and_capped_logits_are_those_of_the_model(kind: str, options: dict[str, Any]) -> None:
    base: Any = tiny_family(kind, **options)
    network = build(base)
    ids = torch.arange(1, 9).unsqueeze(0)
    decoder = getattr(base, base.base_model_prefix)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        found = network.logits(decoder(input_ids=ids).last_hidden_state)
        raw = base.get_output_embeddings()(decoder(input_ids=ids).last_hidden_state)
    assert torch.equal(found, expected)
    assert torch.equal(raw, expected) == (kind == "llama")


def test_long_windows_cost_no_more_than_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored configuration may be somebody else's."""
    lengths = []
    embed_slots = PredictorNetwork.embed_slots

    def record(network: PredictorNetwork, auxiliaries: torch.Tensor, sampling: Any) -> torch.Tensor:
        lengths.append(auxiliaries.shape[-1])
        return embed_slots(network, auxiliaries, sampling)

    monkeypatch.setattr(PredictorNetwork, "embed_slots", record)
    PredictorNetwork(PredictorConfig(BackboneSettings(path="unused"), window_length=4096), tiny_family("llama"))
    assert set(lengths) == {support.MAX_WINDOW}


@pytest.mark.parametrize("size", [24, 1000, 1500, 4096])
def test_sliding_windows_of_any_length_are_compared(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_family("mistral", sliding_window=size, max_position_embeddings=8192)
    build(base)
    assert base.config.sliding_window == size
    monkeypatch.setattr(dispatch, "layer_masks", lambda config, mask: mask)  # as if there were no windows
    with pytest.raises(ValueError, match="expected the logits of the base model .mistral., found others in packed"):
        build(tiny_family("mistral", sliding_window=size, max_position_embeddings=8192))


def test_a_window_that_is_not_read_from_the_configuration_is_compared_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to the longest document of the check."""
    monkeypatch.setattr(support, "SHORT_WINDOW", 1000)
    monkeypatch.setattr(dispatch, "layer_masks", lambda config, mask: mask)
    with pytest.raises(ValueError, match="found others in packed rows"):
        build(tiny_family("mistral", sliding_window=1000, max_position_embeddings=8192))


def test_several_rows_of_random_documents_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, ...]] = []
    encode = PredictorNetwork.encode

    def record(network: PredictorNetwork, batch: PackedBatch, *more: Any) -> Any:
        rows.append(tuple(batch.input_ids[0].tolist()))
        return encode(network, batch, *more)

    monkeypatch.setattr(PredictorNetwork, "encode", record)
    build(tiny_family("llama"))
    assert len(set(rows[: support.NUM_ROWS])) == support.NUM_ROWS > 1


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": ("recurrent_gemma", {"head_dim": 16, "lru_width": 32, "attention_window_size": 16}, "packed rows"),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 with layers of type conv, which fails"),
    "ALiBi": (
        "falcon",
        {"alibi": True, "num_key_value_heads": ..., "intermediate_size": ..., "max_position_embeddings": ...,
         "new_decoder_architecture": False},
        "falcon, which fails with",
    ),
    "flattened layers": (
        "opt",
        {"ffn_dim": 32, "word_embed_proj_dim": 32, "num_key_value_heads": ..., "intermediate_size": ...},
        r"fc1 of opt, .*set predictor\.lora\.target_modules to \[k_proj, out_proj, q_proj, v_proj\]",
    ),
    "flattened expert": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
        r"of qwen2_moe, .*set predictor\.lora\.target_modules to \[k_proj, o_proj, q_proj, v_proj\]",
    ),
    "experts": (
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2},
        r"of olmoe, .*set predictor\.lora\.target_modules to \[k_proj, o_proj, q_proj, v_proj\]",
    ),
    "attention chosen by its name": (
        "falcon",
        {"alibi": False, "num_key_value_heads": ..., "intermediate_size": ..., "new_decoder_architecture": False},
        "falcon.*found others in packed rows",
    ),
    "attention in two halves": ("diffllama", {}, "expected plain softmax attention, .* diffllama"),
    "arguments that do not reach attention": ("nemotron", {}, "slots that see the text before them alone"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(kind: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        build(tiny_family(kind, **options))
    assert "\n" not in str(error.value)


def test_no_advice_for_adapters_of_a_model_that_is_refused_for_itself() -> None:
    """Convolutions, which carry no adapter, in layers that know no documents."""
    with pytest.raises(
        ValueError, match=r"^expected [^\n]*\(qwen3_next\), found others in packed rows[^\n]*$"
    ) as error:
        build(build_family(family_config("qwen3_next")))
    assert "target_modules" not in str(error.value) and support.ADVICE in str(error.value)


@pytest.mark.parametrize("kind", ["opt", "qwen2_moe", "olmoe"])
def test_what_the_refusal_advises_works(kind: str) -> None:
    _, options, _ = next(entry for entry in REFUSED.values() if entry[0] == kind)
    targets = ["k_proj", "q_proj", "v_proj", "out_proj" if kind == "opt" else "o_proj"]
    build(tiny_family(kind, **options), targets)


@pytest.mark.parametrize(("kind", "name"), [("bloom", "BloomForCausalLM"), ("xglm", "XGLMForCausalLM")])
def test_models_without_the_attention_function_are_named(kind: str, name: str) -> None:
    entries = {"model_type": kind, "vocab_size": 64, "d_model" if kind == "xglm" else "hidden_size": 32}
    message = rf"^expected a model with SDPA attention, found {name} without: .*set predictor\.backbone\.path[^\n]*$"
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneSettings(from_config=entries))


def test_attention_with_biases_of_its_own_is_refused() -> None:
    """Its masks hold numbers that depend on values; an attention back-end does not see them."""
    with pytest.raises(ValueError, match="^expected plain softmax attention, found that slots of doge differ"):
        build(build_family(family_config("doge")))


def test_rounding_does_not_depend_on_the_random_weights_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []
    difference = support._difference

    def noted(found: torch.Tensor, expected: torch.Tensor) -> float:
        measured.append(difference(found, expected))
        return measured[-1]

    monkeypatch.setattr(support, "_difference", noted)
    of_slots = []
    for seed in (0, 1):
        torch.manual_seed(2)
        base = tiny_family("llama").bfloat16()
        torch.manual_seed(seed)
        build(base)
        of_slots.append(measured[-1])
    assert of_slots[0] == of_slots[1] > 0


def test_models_of_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"^expected a model of text alone, .* found gemma3: set predictor\.backbone"):
        build(build_family(family_config("gemma3")))


def test_weights_that_are_no_numbers() -> None:
    base: Any = tiny_family("llama")
    with torch.no_grad():
        base.get_output_embeddings().weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="expected finite logits of the base model"):
        build(base)
