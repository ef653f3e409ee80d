"""Tensors of an adapter folder that are of another kind, shape or size, or not finite, are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptp_lightning.export.checkpoint import SETTINGS_FILE, load_network, save_network
from ptp_lightning.export.stored_predictor import ADAPTER_FILE, SLOT_ENCODER_FILE
from ptp_lightning.ngrams import count_ngrams
from tests.helpers.stored_predictors import SAMPLING, edit, trained


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with tensors of all kinds."""
    folder = tmp_path_factory.mktemp("damaged") / "export"
    order = replace(SAMPLING, order="embedding")
    network = trained(base, sampling=order, ngrams=4, draft_vocabulary=6)
    assert network.slot_encoder.ngrams is not None
    network.slot_encoder.ngrams.set(count_ngrams([[3, 1, 4]], size=4))
    save_network(network, folder)
    load_network(folder)
    return folder


class TestDamagedTensors:
    """Refused in one line that names the folder and the tensor."""

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            *(("placeholder", []), ("embeddings.0.head.0.weight", [8]), ("lora_A", [])),
            *(("correction.layers.0.mlp.gate_proj.weight", []), ("ngrams.probabilities", [])),
            *(("token_ranks", []), ("draft_token_ids", []), ("ngrams.token_ids", [])),
        ],
    )
    def test_of_another_kind_or_shape(self, whole: Path, tmp_path: Path, name: str, shape: list[int]) -> None:
        is_index = name in ("token_ranks", "draft_token_ids", "ngrams.token_ids")
        good, bad = (torch.int64, torch.float32) if is_index else (torch.float32, torch.int32)
        kinds = (bad, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
        for value in (*(torch.zeros(2, 3).to(kind) for kind in kinds), torch.ones(shape, dtype=good)):
            folder = damaged(whole, tmp_path / f"{value.dtype}", name, value)
            with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
                load_network(folder)
            assert str(refused.value).startswith(f"{folder}: expected ") and name in str(refused.value)

    @pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e39])
    @pytest.mark.parametrize("name", ["placeholder", "lora_A"])
    def test_not_finite(self, whole: Path, tmp_path: Path, name: str, broken: float) -> None:
        def damage(value: torch.Tensor) -> torch.Tensor:
            value = value.double()
            value.view(-1)[-1] = broken
            return value

        folder = damaged(whole, tmp_path, name, damage)
        with pytest.raises(ValueError, match=rf"^{folder}: expected finite weights in [^\n]*{name}[^\n]*, found a NaN"):
            load_network(folder)

    def test_an_adapter_without_its_layers(self, whole: Path, tmp_path: Path) -> None:
        folder = damaged(whole, tmp_path, "none", torch.zeros(1))
        save_file({"none": torch.zeros(1)}, folder / ADAPTER_FILE)
        config = json.loads((folder / SETTINGS_FILE).read_text())["config"]
        edit(folder, config=config | {"lora": config["lora"] | {"rank": 4096}})
        with pytest.raises(ValueError, match=r"export: expected predictor\.lora\.rank .*weights, none, found 4096$"):
            load_network(folder)


def damaged(
    folder: Path, parent: Path, name: str, value: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
) -> Path:
    """A copy of an export in which one tensor is another one."""
    copied = Path(shutil.copytree(folder, parent / "export"))
    file = copied / (ADAPTER_FILE if name == "lora_A" else SLOT_ENCODER_FILE)
    weights = load_file(file)
    stored = min((one for one in weights if name in one), default=name)
    weights[stored] = value if isinstance(value, torch.Tensor) else value(weights[stored])
    save_file(weights, file)
    return copied
