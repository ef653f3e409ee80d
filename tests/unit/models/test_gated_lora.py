"""The gate: context positions stay the base model's, bit for bit; open positions are ordinary LoRA."""

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError
from transformers import PreTrainedModel

from ptp_lightning.models.lora.gate import Gate
from ptp_lightning.models.lora.gated_linear import GatedLoraLinear, use_gated_layers
from ptp_lightning.models.lora.gated_lora import LoraSettings, add_gated_lora
from tests.helpers.tiny_gated_lora import CONTEXT, INPUT_IDS, SLOT_MASK, SLOTS, fill_adapter, gated, logits
from tests.helpers.tiny_models import TINY_MODELS, cast_weights, tiny_gpt2, tiny_llama

DTYPES = [torch.float32, torch.bfloat16]


def base_of(model: PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", TINY_MODELS)
class TestContextIsUntouched:
    def test_context_logits_equal_the_base_bit_for_bit(self, family: str, dtype: torch.dtype) -> None:
        base = cast_weights(TINY_MODELS[family](), dtype)
        model, gate = gated(copy.deepcopy(base))
        expected = logits(base)
        with gate.open(suffix=SLOTS):
            by_suffix = logits(model)
        with gate.open(SLOT_MASK):
            by_mask = logits(model)
        for actual in (by_suffix, by_mask):
            assert actual.dtype == dtype
            assert torch.equal(actual[:, :CONTEXT], expected[:, :CONTEXT])
            assert (actual[:, CONTEXT:] != expected[:, CONTEXT:]).any(dim=-1).all()

    def test_closed_gate_equals_the_base_everywhere(self, family: str, dtype: torch.dtype) -> None:
        base = cast_weights(TINY_MODELS[family](), dtype)
        model, gate = gated(copy.deepcopy(base))
        expected = logits(base)
        assert torch.equal(logits(model), expected)
        with gate.open(torch.zeros_like(SLOT_MASK)):
            assert torch.equal(logits(model), expected)
        with gate.open(suffix=0):
            assert torch.equal(logits(model), expected)
        with gate.open(), gate.closed():
            assert torch.equal(logits(model), expected)

    def test_open_gate_equals_vanilla_lora(self, family: str, dtype: torch.dtype) -> None:
        base = cast_weights(TINY_MODELS[family](), dtype)
        fan_in_fan_out = family == "gpt2"
        config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", fan_in_fan_out=fan_in_fan_out)
        vanilla = get_peft_model(copy.deepcopy(base), config).eval()
        fill_adapter(vanilla)
        model, gate = gated(base)
        expected = logits(vanilla)
        with gate.open():
            torch.testing.assert_close(logits(model), expected)
        with gate.open(suffix=CONTEXT + SLOTS):
            torch.testing.assert_close(logits(model), expected)


def test_every_linear_layer_but_the_head_is_adapted_and_nothing_else_trains() -> None:
    model, _ = add_gated_lora(tiny_llama(), LoraSettings(rank=4))
    adapted = [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    assert len(adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())
    assert not any(module.training for module in model.modules())


def test_new_adapter_changes_nothing() -> None:
    base = tiny_llama()
    model, gate = add_gated_lora(copy.deepcopy(base), LoraSettings(rank=4))
    with gate.open():
        torch.testing.assert_close(logits(model), logits(base))


def test_adapter_is_float32_on_a_bfloat16_base() -> None:
    base = cast_weights(tiny_llama(), torch.bfloat16)
    model, _ = add_gated_lora(base, LoraSettings(rank=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_bfloat16_adapter_leaves_the_context_unchanged() -> None:
    base = cast_weights(tiny_llama(), torch.bfloat16)
    model, gate = gated(copy.deepcopy(base))
    cast_weights(model, torch.bfloat16)
    with gate.open(SLOT_MASK):
        assert torch.equal(logits(model)[:, :CONTEXT], logits(base)[:, :CONTEXT])
    with gate.open(suffix=SLOTS):
        assert torch.equal(logits(model)[:, :CONTEXT], logits(base)[:, :CONTEXT])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_suffix_equals_its_mask(dtype: torch.dtype) -> None:
    model, gate = gated(cast_weights(tiny_llama(), dtype))
    with gate.open(suffix=SLOTS):
        by_suffix = logits(model)
    with gate.open(SLOT_MASK):
        by_mask = logits(model)
    torch.testing.assert_close(by_suffix, by_mask)


def test_mask_may_differ_between_rows() -> None:
    base = tiny_llama()
    model, gate = gated(copy.deepcopy(base))
    mask = torch.zeros_like(SLOT_MASK)
    mask[0, 5] = True  # row 1 stays closed; in row 0 later positions see slot 5 through attention
    with gate.open(mask):
        actual = logits(model)
    expected = logits(base)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0, :5], expected[0, :5])
    assert (actual[0, 5:] != expected[0, 5:]).any(dim=-1).all()


class ProductsWithRank(TorchDispatchMode):
    """Records the number of rows of each matrix product `[rows, in] x [in, rank]`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].shape[1] == self.rank:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_trained", [False, True])
def test_suffix_computes_the_low_rank_term_on_open_positions_only(is_trained: bool) -> None:
    model, gate = gated(tiny_llama(), rank=3)  # a size that nothing else has
    with torch.set_grad_enabled(is_trained), ProductsWithRank(3) as products:
        model(INPUT_IDS)
        assert products.rows == []
        with gate.open(suffix=SLOTS):
            model(INPUT_IDS)
    assert products.rows == [2 * SLOTS] * 2 * 7


def test_flattened_input_of_a_layer_fits_the_mask() -> None:
    model, gate = gated(tiny_llama())
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(2, CONTEXT + SLOTS, 32)
    with torch.no_grad(), gate.open(SLOT_MASK):
        torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))


def test_shapes_that_do_not_fit_name_the_layer() -> None:
    model, gate = gated(tiny_llama())
    with gate.open(SLOT_MASK[:, 1:]), pytest.raises(ValueError, match=r"\[2, 10\].*\[2, 11, 32\].*layers.0.self_attn"):
        logits(model)
    with gate.open(suffix=12), pytest.raises(ValueError, match=r"suffix of 12 positions.*\[2, 11, 32\]"):
        logits(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with gate.open(suffix=1), pytest.raises(ValueError, match=r"mlp\.up_proj"):
        layer(torch.randn(22, 32))


class TestGradients:
    def gradients(self, model: PeftModel) -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    def loss(self, model: PeftModel, positions: slice) -> Tensor:
        return model(INPUT_IDS).logits[:, positions].square().mean()

    @pytest.mark.parametrize("opening", [{"mask": SLOT_MASK}, {"suffix": SLOTS}], ids=["mask", "suffix"])
    def test_flows_through_open_positions_only(self, opening: dict[str, Any]) -> None:
        model, gate = gated(tiny_llama())
        with gate.open(**opening):
            self.loss(model, slice(CONTEXT, None)).backward()
        through_slots = self.gradients(model)
        assert len(through_slots) == 2 * 2 * 7
        assert all(gradient.abs().sum() > 0 for gradient in through_slots.values())
        with gate.open(**opening):
            self.loss(model, slice(0, CONTEXT)).backward()
        through_context = self.gradients(model)
        assert all(gradient.abs().sum() == 0 for gradient in through_context.values())

    def test_suffix_and_mask_have_the_same_gradient(self) -> None:
        model, gate = gated(tiny_llama())
        with gate.open(SLOT_MASK):
            self.loss(model, slice(None)).backward()
        by_mask = self.gradients(model)
        with gate.open(suffix=SLOTS):
            self.loss(model, slice(None)).backward()
        torch.testing.assert_close(self.gradients(model), by_mask)

    def test_closed_gate_leaves_the_adapter_out_of_the_graph(self) -> None:
        model, _ = gated(tiny_llama())
        assert not self.loss(model, slice(None)).requires_grad

    @pytest.mark.parametrize(
        "opening", [{"mask": torch.zeros_like(SLOT_MASK)}, {"suffix": 0}], ids=["empty mask", "suffix 0"]
    )
    def test_open_nowhere_gives_zero_gradients_for_ddp(self, opening: dict[str, Any]) -> None:
        model, gate = gated(tiny_llama())
        with gate.open(**opening):
            self.loss(model, slice(None)).backward()
        gradients = self.gradients(model)
        assert len(gradients) == 2 * 2 * 7
        assert all((gradient == 0).all() for gradient in gradients.values())

    @pytest.mark.parametrize("opening", [{"mask": SLOT_MASK}, {"suffix": SLOTS}], ids=["mask", "suffix"])
    def test_activation_checkpointing_remembers_the_gate_until_backward(self, opening: dict[str, Any]) -> None:
        model, gate = gated(tiny_llama())
        with gate.open(**opening):
            loss = self.loss(model, slice(None))
        loss.backward()
        expected = self.gradients(model)

        base_of(model).activation_checkpointing_enable({"use_reentrant": False, "context_fn": gate.checkpoint_contexts})
        model.train()  # transformers checkpoints in train mode only; this model has no dropout
        with gate.open(**opening):
            loss = self.loss(model, slice(None))
        assert gate.state is None
        loss.backward(retain_graph=True)  # recomputes with a closed gate
        torch.testing.assert_close(self.gradients(model), expected, rtol=0, atol=0)
        loss.backward()  # and once more
        torch.testing.assert_close(self.gradients(model), expected, rtol=0, atol=0)

    def test_checkpointing_that_forgets_the_gate_is_noticed(self) -> None:
        model, gate = gated(tiny_llama())
        base_of(model).activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        with gate.open(suffix=SLOTS):
            loss = self.loss(model, slice(None))
        with pytest.raises(CheckpointError):
            loss.backward()


class TestFiles:
    def test_peft_opens_a_saved_adapter(self, tmp_path: Path) -> None:
        base = tiny_gpt2()
        model, gate = gated(copy.deepcopy(base), alpha=6.0, rank_pattern={"c_attn": 2})
        model.save_pretrained(str(tmp_path), save_embedding_layers=False)
        assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        config = LoraConfig.from_pretrained(str(tmp_path))
        loaded_gate = Gate()
        use_gated_layers(config, loaded_gate)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), config=config)
        openings: list[dict[str, Any]] = [{}, {"suffix": SLOTS}, {"mask": SLOT_MASK}]
        for opening in openings:
            with gate.open(**opening), loaded_gate.open(**opening):
                assert torch.equal(logits(loaded), logits(model))
        assert torch.equal(logits(loaded), logits(base))
        without_gate = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
        with gate.open():
            torch.testing.assert_close(logits(without_gate), logits(model))

    def test_adapters_that_are_loaded_later_have_the_same_gate(self, tmp_path: Path) -> None:
        base = tiny_llama()
        model, gate = gated(copy.deepcopy(base))
        model.save_pretrained(str(tmp_path), save_embedding_layers=False)
        model.load_adapter(str(tmp_path), "second")
        with gate.open():
            expected = logits(model)
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(base))
        with gate.open():
            assert not torch.equal(logits(model), logits(base))
            assert torch.equal(logits(model), expected)

    def test_kinds_of_adapters_that_cannot_be_gated_are_refused(self) -> None:
        model, _ = gated(tiny_llama())
        for settings, message in [({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias")]:
            with pytest.raises(ValueError, match=message):
                model.add_adapter("other", LoraConfig(target_modules=["q_proj"], **settings))

    def test_several_active_adapters_are_refused(self) -> None:
        model, _ = gated(tiny_llama())
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="one active adapter"):
            model.base_model.set_adapter(["default", "second"])


def test_disabled_adapters_leave_the_base_model() -> None:
    base = tiny_llama()
    model, gate = gated(copy.deepcopy(base))
    with gate.open(), model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
        assert not model(INPUT_IDS).logits.requires_grad


@pytest.mark.parametrize("family", TINY_MODELS)
def test_unloading_gives_the_base_model_back(family: str) -> None:
    base = TINY_MODELS[family]()
    tokens = torch.arange(1, 9).view(1, 8)
    expected = base(tokens).logits
    model, gate = add_gated_lora(base, LoraSettings(rank=2))
    with gate.open():
        assert torch.equal(model.unload()(tokens).logits, expected)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_is_refused_and_changes_nothing(method: str, safe_merge: bool) -> None:
    base = tiny_llama()
    model, _ = gated(copy.deepcopy(base))
    with pytest.raises(ValueError, match="cannot be merged"):
        getattr(model, method)(safe_merge=safe_merge)
    assert torch.equal(logits(model), logits(base))


def test_copies_have_a_gate_of_their_own() -> None:
    model, gate = gated(tiny_llama())
    copied = copy.deepcopy(model)
    gates = {layer.gate for layer in copied.modules() if isinstance(layer, GatedLoraLinear)}
    assert len(gates) == 1
    with gates.pop().open():
        assert gate.state is None
        assert not torch.equal(logits(copied), logits(model))


def test_conv1d_layers_are_adapted_without_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = gated(tiny_gpt2())
    assert sum(isinstance(layer, LoraLayer) for layer in model.modules()) == 2 * 4


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "key"),
        [
            ({"rank": 0}, "rank"),
            ({"alpha": 0.0}, "alpha"),
            ({"alpha": float("nan")}, "alpha"),
            ({"dropout": 1.0}, "dropout"),
            ({"target_modules": []}, "target_modules"),
            ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ],
    )
    def test_values_out_of_range(self, settings: dict[str, Any], key: str) -> None:
        with pytest.raises(ValueError, match=rf"predictor\.lora\.{key}"):
            LoraSettings(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"target_modules": ["q_proj", "v_porj"]}, r"target_modules: no module matches 'v_porj'.*v_proj"),
            ({"target_modules": "q_porj"}, r"target_modules: no module matches 'q_porj'"),
            ({"target_modules": "("}, r"target_modules: '\(' is not a regular expression"),
            ({"rank_pattern": {"q_porj": 2}}, r"rank_pattern: no module matches 'q_porj'"),
            ({"target_modules": ["mlp"]}, r"target_modules=\['mlp'\]"),
            ({"target_modules": ["lm_head"]}, "lm_head of llama, which is the output head"),
            (
                {"target_modules": ["embed_tokens"]},
                r"embed_tokens of llama, which is a Embedding: set predictor\.lora\.target_modules",
            ),
        ],
    )
    def test_patterns_that_fit_no_gateable_layer(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            add_gated_lora(tiny_llama(), LoraSettings(**settings))

    def test_second_adapter_on_the_same_base_is_refused(self) -> None:
        model = tiny_llama()
        add_gated_lora(model, LoraSettings(rank=4))
        with pytest.raises(ValueError, match="already holds an adapter"):
            add_gated_lora(model, LoraSettings(rank=4))

    def test_ranks_and_target_modules_are_respected(self) -> None:
        settings = LoraSettings(rank=4, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.0.*up_proj": 2})
        model, _ = add_gated_lora(tiny_llama(), settings)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        ranks = {
            name.removeprefix("base_model.model.model.layers."): layer.r["default"] for name, layer in layers.items()
        }
        assert ranks == {
            "0.self_attn.q_proj": 4,
            "0.mlp.up_proj": 2,
            "1.self_attn.q_proj": 4,
            "1.mlp.up_proj": 4,
        }
