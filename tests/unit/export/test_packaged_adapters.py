"""Adapters by name: those of the package are complete and small, and one that is not there is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptp_lightning import ParallelTokenPredictor
from ptp_lightning.export import packaged_adapters
from ptp_lightning.export.checkpoint import load_network, save_network
from ptp_lightning.export.packaged_adapters import PACKAGED_ADAPTERS, packaged_adapter_folder
from ptp_lightning.export.stored_predictor import ADAPTER_FILE, EXPORTED_FILES, read_predictor
from ptp_lightning.models import PredictorConfig
from ptp_lightning.utils.pretrained import embedded_folder
from tests.helpers.stored_predictors import slot_logits, trained

MAX_BYTES = 12_000_000
PRESENT = [name for name, one in PACKAGED_ADAPTERS.items() if embedded_folder(one.folder).is_dir()]


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the package's."""
    monkeypatch.setattr(packaged_adapters, "embedded_folder", lambda name: tmp_path / "assets" / name)
    return tmp_path / "assets"


@pytest.mark.parametrize("name", PRESENT)
def test_what_is_shipped_is_complete_and_small(name: str) -> None:
    folder = packaged_adapter_folder(name)
    has_lora = PredictorConfig.from_dict(read_predictor(name).config).has_lora
    expected = set(EXPORTED_FILES) - (set() if has_lora else {"adapter_config.json", ADAPTER_FILE})
    assert {file.name for file in folder.iterdir()} == expected
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= MAX_BYTES


def test_the_code_adapter_is_the_default() -> None:
    assert read_predictor().path == read_predictor("code").path == packaged_adapter_folder("code")


@pytest.mark.parametrize("name", PACKAGED_ADAPTERS)
def test_found_when_it_is_there(name: str, assets: Path, base: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^expected the adapter '{name}' \(for [^\n]*, found nothing[^\n]*$"):
        load_network(name)
    save_network(trained(base), assets / PACKAGED_ADAPTERS[name].folder)
    predictor = ParallelTokenPredictor.from_pretrained(name)
    assert torch.equal(slot_logits(predictor.network), slot_logits(trained(base)))


def test_the_message_names_those_that_are_there(assets: Path, base: Path) -> None:
    save_network(trained(base), assets / PACKAGED_ADAPTERS["code"].folder)
    with pytest.raises(FileNotFoundError, match=r"set model to one that is there \(code\), or train it"):
        load_network("smollm2")


def test_a_folder_of_the_same_name_is_opened_by_its_path(
    assets: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_network(trained(base), "smollm2")
    assert read_predictor("./smollm2").path == Path("smollm2")
    with pytest.raises(FileNotFoundError, match="adapter 'smollm2'"):
        read_predictor("smollm2")


def test_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"at llama, found nothing: .*packaged adapter \(code, smollm2\)"):
        read_predictor("llama")
