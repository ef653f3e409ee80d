"""Predictors on disk: a round trip is exact, or there is one clear error; nothing incomplete is left."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptp_lightning.export import checkpoint, packaged_adapters
from ptp_lightning.export.checkpoint import load_network, save_network
from ptp_lightning.export.stored_predictor import ADAPTER_FILE, EXPORTED_FILES, SLOT_ENCODER_FILE, read_predictor
from ptp_lightning.models import (
    BinaryFeatures,
    CosineFeatures,
    LoraSettings,
)
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from tests.helpers.stored_predictors import SAMPLING, edit, slot_logits, trained
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama
from tests.helpers.tiny_predictors import OBJECTIVES


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `base`, with one number changed."""
    path = tmp_path_factory.mktemp("other_base")
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    model.save_pretrained(path)
    return path


@pytest.fixture
def exported(base: Path, tmp_path: Path) -> Path:
    save_network(trained(base), tmp_path / "export")
    return tmp_path / "export"


class TestRoundTrip:
    @pytest.mark.parametrize("features", [CosineFeatures(num_frequencies=3), BinaryFeatures(bits=5)])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_everything_comes_back(
        self, base: Path, tmp_path: Path, objective: str, features: AuxiliaryFeatures
    ) -> None:
        head = "linear" if objective == "one_hot" else "mlp"
        before = trained(base, objective=OBJECTIVES[objective], features=features, head=head)
        save_network(before, tmp_path / "export")
        after = load_network(tmp_path / "export")
        assert after.config == before.config
        assert after.config.sampling == SAMPLING
        assert not any(module.training for module in after.modules())
        assert torch.equal(slot_logits(after), slot_logits(before))

    def test_other_family_and_ranks(self, tmp_path: Path) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "base")
        lora = LoraSettings(rank=2, alpha=3.0, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 4})
        before = trained(tmp_path / "base", lora=lora)
        save_network(before, tmp_path / "export")
        assert torch.equal(slot_logits(load_network(tmp_path / "export")), slot_logits(before))

    def test_bfloat16_on_disk_is_float32_in_memory(self, base: Path, tmp_path: Path) -> None:
        before = trained(base)
        save_network(before, tmp_path / "export", dtype=torch.bfloat16)
        after = load_network(tmp_path / "export").trainable_state()
        for name, weight in before.trainable_state().items():
            assert weight.dtype == after[name].dtype == torch.float32
            assert torch.equal(after[name], weight.to(torch.bfloat16).float())
        for file in (ADAPTER_FILE, SLOT_ENCODER_FILE):
            assert {weight.dtype for weight in load_file(tmp_path / "export" / file).values()} == {torch.bfloat16}

    @pytest.mark.slow  # tests/integration/test_transformers_generate.py, too, opens an export in a fresh process
    def test_in_another_process(self, exported: Path, base: Path) -> None:
        code = (
            "import sys, torch; from tests.unit.export.test_checkpoint import *\n"
            "torch.save(slot_logits(load_network(sys.argv[1])), sys.argv[2])"
        )
        file = exported.parent / "logits.pt"
        subprocess.run([sys.executable, "-c", code, exported, file], check=True, cwd=Path(__file__).parents[3])
        assert torch.equal(torch.load(file), slot_logits(trained(base)))

    def test_peft_opens_it(self, exported: Path, base: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # about keys that are missing or not expected
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(exported))
        assert model.peft_config["default"].base_model_name_or_path == str(base)
        found = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
        expected = {name: value for name, value in trained(base).language_model.state_dict().items() if "lora_" in name}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)

    def test_no_base_weight_is_written(self, exported: Path) -> None:
        assert {file.name for file in exported.iterdir()} == set(EXPORTED_FILES)
        assert all("lora_" in name for name in load_file(exported / ADAPTER_FILE))

    def test_files_are_as_readable_as_any_other(self, exported: Path) -> None:
        (exported.parent / "usual").write_text("")
        assert {file.stat().st_mode for file in exported.iterdir()} == {(exported.parent / "usual").stat().st_mode}

    def test_training_numbers(self, base: Path, tmp_path: Path) -> None:
        training = {"steps": 400, "prefix_counts": [0, 3, 2, 2, 1], "val/correct_tokens": 3.25}
        save_network(trained(base), tmp_path / "export", training=training)
        assert read_predictor(tmp_path / "export").training == training
        assert load_network(tmp_path / "export").prefix_counts == [0, 3, 2, 2, 1]
        card = (tmp_path / "export" / "README.md").read_text()
        assert "| Training steps | 400 |\n| `val/correct_tokens` | 3.250 |" in card

    def test_card(self, exported: Path, base: Path) -> None:
        card = (exported / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: peft\npipeline_tag: text-generation\n")  # no base model: a folder
        assert "temperature 0.7, top-k 5, top-p 0.9, vocabulary order" in card
        assert "4 tokens, the first exact, 3 from slots" in card
        assert "| Correction | `DecoderRefiner(num_layers=2, intermediate_size=24, num_refinement_steps=2)` |" in card
        assert '--ckpt_path "export"' in card

    def test_without_a_path_the_shipped_one(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packaged_adapters, "embedded_folder", lambda name: exported.with_name(f"{name} moved"))
        with pytest.raises(FileNotFoundError, match="the adapter 'code' .* at .*embedded_adapter moved, found nothing"):
            load_network()
        exported.rename(exported.with_name("embedded_adapter moved"))
        assert load_network().config.window_length == 4


class TestBaseModel:
    def test_another_one_is_refused(self, exported: Path, base: Path, other_base: Path) -> None:
        edit(exported, config=trained(base).config.to_dict() | {"backbone": {"path": str(other_base)}})
        with pytest.raises(ValueError, match=r"another base model at .*other_base.*: set base"):
            load_network(exported)

    def test_may_move(self, exported: Path, base: Path, tmp_path: Path) -> None:
        edit(exported, config=trained(base).config.to_dict() | {"backbone": {"path": str(tmp_path / "gone")}})
        with pytest.raises(FileNotFoundError, match=r"model folder at .*gone, found nothing: set base"):
            load_network(exported)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after = load_network(exported, base=base)
        assert torch.equal(slot_logits(after), slot_logits(trained(base)))

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_may_be_rounded(self, exported: Path, dtype: Any) -> None:
        after = load_network(exported, dtype=dtype)
        assert after.base_model.dtype == torch.bfloat16
        assert after.config.backbone.dtype == "bfloat16"
        assert {weight.dtype for weight in after.trainable_state().values()} == {torch.float32}

    def test_auto_is_the_dtype_of_the_training(self, base: Path, tmp_path: Path) -> None:
        predictor = trained(base)
        save_network(predictor, tmp_path / "half")
        plain = predictor.config.to_dict()
        edit(tmp_path / "half", config=plain | {"backbone": {"path": str(base), "dtype": "bfloat16"}})
        for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
            assert load_network(tmp_path / "half", dtype=dtype).base_model.dtype == expected  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize("dtype", ["float16", torch.float16, "half"])
    def test_other_dtypes_are_refused(self, exported: Path, dtype: Any) -> None:
        with pytest.raises(ValueError, match=r"one of auto, float32, bfloat16, found '(float16|half)': set dtype"):
            load_network(exported, dtype=dtype)


class TestWriting:
    @pytest.mark.parametrize("step", ["_save_adapter", "save_file", "model_card"])
    def test_failure_leaves_nothing(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        monkeypatch.setattr(checkpoint, step, disk_full)
        with pytest.raises(OSError, match="disk full"):
            save_network(trained(base), tmp_path / "export")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_failure_leaves_the_earlier_export(
        self, exported: Path, base: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        before = {file.name: file.read_bytes() for file in exported.iterdir()}
        rename = Path.rename

        def stumble(source: Path, target: Path) -> Path:
            if source.name == "new":
                raise error
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", stumble)
        with pytest.raises(type(error)):
            save_network(trained(base, window_length=8), exported, overwrite=True)
        assert {file.name: file.read_bytes() for file in exported.iterdir()} == before
        assert list(exported.parent.iterdir()) == [exported]

    def test_overwrite(self, exported: Path, base: Path) -> None:
        new = trained(base, window_length=8)
        with pytest.raises(ValueError, match=r"export to be new or empty, found .*set output or set overwrite"):
            save_network(new, exported)
        assert load_network(exported).config.window_length == 4
        save_network(new, exported, overwrite=True)
        assert load_network(exported).config == replace(new.config, window_length=8)
        assert list(exported.parent.iterdir()) == [exported]

    def test_overwrite_deletes_no_foreign_file(self, exported: Path, base: Path) -> None:
        (exported / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match=r"expected nothing but an earlier export in .*set output"):
            save_network(trained(base), exported, overwrite=True)
        assert (exported / "thesis.tex").read_text() == "years of work"

    def test_empty_folder_and_missing_parents(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for folder in (tmp_path / "empty", tmp_path / "not" / "yet"):
            save_network(trained(base), folder)
            assert load_network(folder).config.window_length == 4

    def test_a_file_is_in_the_way(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "export").write_text("")
        with pytest.raises(ValueError, match=r"expected a folder to write to, found the file .*export: set output"):
            save_network(trained(base), tmp_path / "export", overwrite=True)


def disk_full(*args: object, **kwargs: object) -> None:
    raise OSError("disk full")
