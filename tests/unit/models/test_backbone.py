"""Where a backbone comes from, what is said when it cannot, and how it is recognised again."""

import copy
import io
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

from ptp_lightning.models.backbone import BackboneSettings, fingerprint, known_positions, load_backbone
from ptp_lightning.models.lora.gated_lora import LoraSettings, add_gated_lora
from ptp_lightning.utils.pretrained import load_tokenizer
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import TINY_MODELS, cast_weights, tiny_gpt2, tiny_llama

INPUT_IDS = torch.tensor([[3, 1, 4, 1, 5]])
TINY_CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever looks like a local path must not reach for the hub; a hub id fails at once instead of waiting."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("network used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def transformers_log() -> Iterator[io.StringIO]:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    hf_logging.add_handler(handler)
    yield log
    hf_logging.remove_handler(handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as shipped: bfloat16 safetensors and configuration."""
    path = tmp_path / "teacher"
    cast_weights(tiny_llama(), torch.bfloat16).save_pretrained(path)
    return path


def settings_for(path: Path | str, **more: Any) -> BackboneSettings:
    return BackboneSettings(path=str(path), **more)


class TestLocalFolder:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_model_is_ready_to_use(self, folder: Path, dtype: str) -> None:
        model = load_backbone(settings_for(folder, dtype=dtype))
        assert not model.training
        assert model.config._attn_implementation == "sdpa"
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        expected = cast_weights(cast_weights(tiny_llama(), torch.bfloat16), getattr(torch, dtype))
        assert torch.equal(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)

    def test_nothing_is_printed(
        self, folder: Path, capfd: pytest.CaptureFixture[str], transformers_log: io.StringIO
    ) -> None:
        capfd.readouterr()
        load_backbone(settings_for(folder))
        assert (*capfd.readouterr(), transformers_log.getvalue()) == ("", "", "")

    @pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
    def test_positions_are_known_before_weights_are_read(self, tmp_path: Path, build: Any) -> None:
        model = build()
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert known_positions(settings_for(tmp_path)) == model.config.max_position_embeddings
        assert known_positions(settings_for("user/name")) is None  # and no network is used
        with pytest.raises(FileNotFoundError, match=r"^expected a model folder at .*gone, found nothing: set base$"):
            known_positions(settings_for(tmp_path / "gone"), key="base")

    def test_relative_path(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder.parent)
        for path in ("teacher", "./teacher"):
            assert load_backbone(settings_for(path)).config.hidden_size == 32

    def test_random_weights_need_only_the_configuration(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        model = load_backbone(settings_for(folder, random_weights=True, dtype="bfloat16"))
        assert model.config.hidden_size == 32
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.config._attn_implementation == "sdpa"

    def test_logging_state_is_left_as_found(self, folder: Path) -> None:
        before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
        load_backbone(settings_for(folder))
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="cannot be read"):
            load_backbone(settings_for(folder))
        assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


class TestBadInput:
    @pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "nowhere.gguf"])
    def test_missing_path_is_not_looked_up_on_the_hub(self, path: str) -> None:
        with pytest.raises(FileNotFoundError, match=r"found nothing: set predictor\.backbone\.path"):
            load_backbone(settings_for(path))

    def test_unreachable_hub_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"predictor\.backbone\.path=nobody/nothing cannot be read"):
            load_backbone(settings_for("nobody/nothing"))

    def test_folder_without_configuration(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"expected config\.json in .*model\.safetensors.*backbone\.path"):
            load_backbone(settings_for(folder))

    def test_folder_without_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"expected \*\.safetensors weights in .*config\.json"):
            load_backbone(settings_for(folder))

    @pytest.mark.parametrize("kept_bytes", [0, 4, 5000])
    def test_truncated_safetensors(self, folder: Path, kept_bytes: int) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept_bytes])
        with pytest.raises(ValueError, match=r"predictor\.backbone\.path=.* cannot be read"):
            load_backbone(settings_for(folder))

    def test_configuration_that_is_no_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"predictor\.backbone\.path=.* cannot be read"):
            load_backbone(settings_for(folder))

    def test_missing_weights(self, folder: Path, tmp_path: Path) -> None:
        tiny_llama(num_layers=3).config.save_pretrained(folder)
        with pytest.raises(ValueError, match=r"backbone\.path=.*weights are missing for model\.layers\.2.* more"):
            load_backbone(settings_for(folder))

    def test_weights_of_another_size(self, folder: Path) -> None:
        tiny_llama(intermediate_size=48).config.save_pretrained(folder)
        with pytest.raises(ValueError, match=r"predictor\.backbone\.path=.* cannot be read"):
            load_backbone(settings_for(folder))

    def test_weights_without_use_are_mentioned_in_one_line(self, folder: Path, transformers_log: io.StringIO) -> None:
        tiny_llama(num_layers=1).config.save_pretrained(folder)
        with pytest.warns(UserWarning, match=r"unused weights: model\.layers\.1"):
            load_backbone(settings_for(folder))
        assert transformers_log.getvalue() == ""

    def test_file_that_is_no_gguf(self, tmp_path: Path) -> None:
        file = tmp_path / "model.gguf"
        file.write_bytes(b"PK\x03\x04 something else")
        with pytest.raises(ValueError, match=r"or a GGUF file.*b'PK.*predictor\.backbone\.path"):
            load_backbone(settings_for(file))

    def test_broken_gguf(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF\x03\x00\x00\x00")
        with pytest.raises(ValueError, match=r"predictor\.backbone\.path=.* cannot be read"):
            load_backbone(settings_for(file))

    @pytest.mark.parametrize(
        ("settings", "key"),
        [({"path": ""}, "path"), ({"dtype": "float16"}, "dtype"), ({"from_config": {"hidden_size": 4}}, "from_config")],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], key: str) -> None:
        with pytest.raises(ValueError, match=rf"predictor\.backbone\.{key}"):
            BackboneSettings(**settings)


class TestFromConfig:
    def test_fresh_model_follows_the_seed(self) -> None:
        models = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            models.append(load_backbone(BackboneSettings(from_config=TINY_CONFIG)))
        assert models[0].config._attn_implementation == "sdpa"
        assert not models[0].training
        assert fingerprint(models[0]) == fingerprint(models[1]) != fingerprint(models[2])

    def test_needs_nothing_at_the_path(self) -> None:
        assert load_backbone(settings_for("./nowhere", from_config=TINY_CONFIG)).config.hidden_size == 32

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hiden_size": 16}, r"a llama configuration has no \['hiden_size'\]"),
            ({"model_type": "lama"}, "from_config: .*lama"),
            ({"hidden_size": "wide"}, "from_config: .*hidden_size"),
        ],
    )
    def test_mistakes_are_named(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_backbone(BackboneSettings(from_config=TINY_CONFIG | change))

    def test_older_names_are_understood(self) -> None:
        model = load_backbone(BackboneSettings(from_config={**TINY_CONFIG, "rope_theta": 500.0}))
        assert model.config.rope_parameters["rope_theta"] == 500.0
        assert (
            load_backbone(
                BackboneSettings(from_config={"model_type": "gpt2", "hidden_size": 32, "n_layer": 1, "n_head": 2})
            ).config.n_embd
            == 32
        )


def test_embedded_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptp_lightning.utils.pretrained.embedded_folder", lambda: folder)
    assert fingerprint(load_backbone(BackboneSettings())) == fingerprint(tiny_llama())
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"expected a model folder at .*teacher"):
        load_backbone(BackboneSettings())


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 1,
                                                               "_data": {}}}},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "bitnet"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        {"quant_method": "mxfp4"},
        {"quant_method": "of tomorrow"},
    ],
    ids=lambda one: one["quant_method"],
)  # fmt: skip
def test_quantised_weights_are_refused_by_name(quantization: dict[str, Any], folder: Path) -> None:
    """Whether or not the library that reads them is installed; random weights need none of them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    method = quantization["quant_method"]
    message = rf"^expected a base model with plain weights, found llama .* by {method} [^\n]*: set base to [^\n]*$"
    with pytest.raises(ValueError, match=message):
        load_backbone(settings_for(folder), key="base")
    if method != "of tomorrow":
        load_backbone(settings_for(folder, random_weights=True))


def test_gguf_file_gives_an_ordinary_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    model = load_backbone(settings_for(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(model(INPUT_IDS).logits, tiny_llama()(INPUT_IDS).logits)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    model.save_pretrained(tmp_path / "copy")  # which a model straight from GGUF refuses
    assert fingerprint(load_backbone(settings_for(tmp_path / "copy"))) == fingerprint(tiny_llama())
    assert len(load_tokenizer(str(tmp_path / "tiny.gguf"))) >= 64
    with pytest.raises(FileNotFoundError, match=r"or to the \.gguf file itself"):
        load_backbone(settings_for(tmp_path))


class TestFingerprint:
    @pytest.mark.parametrize("family", TINY_MODELS)
    def test_survives_rounding_copies_and_adapters(self, family: str) -> None:
        model = TINY_MODELS[family]()
        expected = fingerprint(model)
        assert len(expected) == 64
        assert fingerprint(cast_weights(copy.deepcopy(model), torch.bfloat16)) == expected
        peft_model, _ = add_gated_lora(model, LoraSettings(rank=4))
        assert fingerprint(peft_model) == fingerprint(peft_model.get_base_model()) == expected

    def test_sees_every_tensor(self) -> None:
        expected = fingerprint(tiny_gpt2())
        for name, _ in tiny_gpt2().named_parameters():
            changed = tiny_gpt2()
            with torch.no_grad():
                changed.get_parameter(name).add_(0.1)
            assert fingerprint(changed) != expected, name

    def test_sees_the_configuration(self) -> None:
        model = tiny_llama()
        expected = fingerprint(model)
        model.config.vocab_size += 1
        assert fingerprint(model) != expected

    def test_samples_all_columns_of_a_large_matrix(self) -> None:
        model = tiny_llama(vocab_size=4096, num_layers=1)
        expected = fingerprint(model)
        with torch.no_grad():
            model.get_parameter("lm_head.weight")[:, 17] += 0.1
        assert fingerprint(model) != expected
