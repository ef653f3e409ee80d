"""Folders and checkpoints that are damaged, hostile or no predictor: one clear error, no allocation, no code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptp_lightning.export.checkpoint import SETTINGS_FILE, load_network, save_network
from ptp_lightning.export.stored_predictor import ADAPTER_FILE, SLOT_ENCODER_FILE
from tests.helpers.stored_predictors import edit, trained


@pytest.fixture
def exported(base: Path, tmp_path: Path) -> Path:
    save_network(trained(base), tmp_path / "export")
    return tmp_path / "export"


class TestBrokenFolder:
    @pytest.mark.parametrize("kept", [0, 4, 300])
    @pytest.mark.parametrize("name", [ADAPTER_FILE, SLOT_ENCODER_FILE])
    def test_corrupt_safetensors(self, exported: Path, name: str, kept: int) -> None:
        (exported / name).write_bytes((exported / name).read_bytes()[:kept])
        with pytest.raises(ValueError, match=rf"^ckpt_path=.*{name} cannot be read: [^\n]+$"):
            load_network(exported)

    @pytest.mark.parametrize("name", [ADAPTER_FILE, SLOT_ENCODER_FILE, SETTINGS_FILE])
    def test_missing_file(self, exported: Path, name: str) -> None:
        (exported / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"expected {name} in .*, found README\.md.*: set ckpt_path"):
            load_network(exported)

    def test_settings_that_are_no_json(self, exported: Path) -> None:
        (exported / SETTINGS_FILE).write_text("{")
        with pytest.raises(ValueError, match=rf"ckpt_path=.*{SETTINGS_FILE} cannot be read"):
            load_network(exported)

    @pytest.mark.parametrize("found", [None, 4])
    def test_another_format(self, exported: Path, found: int | None) -> None:
        edit(exported, format_version=found)
        with pytest.raises(ValueError, match=rf"expected format_version 1 to 3 in .*, found {found}"):
            load_network(exported)

    def test_settings_that_lack_an_entry(self, exported: Path) -> None:
        edit(exported, base_fingerprint=None)
        with pytest.raises(ValueError, match="expected base_fingerprint in "):
            load_network(exported)

    def test_settings_of_no_predictor(self, exported: Path) -> None:
        edit(exported, config={"window_size": 4})
        with pytest.raises(ValueError, match=r"export: expected the configuration of a predictor.*window_size"):
            load_network(exported)

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"lora": {"rank": 4096}}, "lora.rank"),
            ({"features": {"init_args": {"num_frequencies": 10**12}}}, "features"),
            ({"correction": {"init_args": {"num_layers": 10**12}}}, "correction.init_args.num_layers"),
            ({"correction": {"init_args": {"intermediate_size": 10**12}}}, "correction.init_args.intermediate_size"),
        ],
        ids=["rank", "features", "layers of a refiner", "width of a refiner"],
    )
    def test_sizes_without_weights_allocate_nothing(self, exported: Path, changes: dict[str, Any], key: str) -> None:
        config = json.loads((exported / SETTINGS_FILE).read_text())["config"]
        for name, change in changes.items():
            for entry, value in change.items():
                config[name][entry] = {**config[name][entry], **value} if isinstance(value, dict) else value
        edit(exported, config=config)
        found = "4096" if key == "lora.rank" else "10{12}"  # a larger rank is none
        with pytest.raises(
            ValueError, match=rf"{exported}: expected predictor\.{key} .*stored weights.*found {found}$"
        ):
            load_network(exported)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("features", None, "expected settings of predictor.features, found null"),
            ("student", None, "expected settings of predictor.student, found null"),
            ("features", -1, "configuration of a predictor"),
            ("objective", [], "configuration of a predictor"),
            ("head", "x.y.Z", "expected one of linear, mlp for predictor.head, found x.y.Z"),
            ("window_length", {}, "expected int for predictor.window_length"),
            ("lora", {"alpha": float("inf")}, "expected a finite predictor.lora.alpha > 0, found inf"),
        ],
    )
    def test_settings_of_another_kind(self, exported: Path, name: str, value: Any, message: str) -> None:
        config = json.loads((exported / SETTINGS_FILE).read_text())["config"]
        edit(exported, config=config | {name: config[name] | value if isinstance(value, dict) and value else value})
        with pytest.raises(ValueError, match=rf"^{exported}: [^\n]*{message}[^\n]*$"):
            load_network(exported)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("config", value) for value in (5, "x", [])),
            *(("training", value) for value in (5, "x", [])),
            *(("base_fingerprint", value) for value in (5, {})),
        ],
    )
    def test_entries_of_another_kind(self, exported: Path, name: str, value: Any) -> None:
        edit(exported, **{name: value})
        with pytest.raises(ValueError, match=rf"^expected {name} of the kind [^\n]*predictor.json, found [^\n]*$"):
            load_network(exported)

    @pytest.mark.parametrize("counts", ["abc", [[1]], [-1, 2], [0.5]])
    def test_counts_that_are_none(self, exported: Path, counts: Any) -> None:
        edit(exported, training={"prefix_counts": counts})
        with pytest.raises(ValueError, match=r"^expected prefix_counts as a list of whole numbers in [^\n]*$"):
            load_network(exported)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ({"hidden_size": 2**23}, r"expected a model of predictor.backbone.from_config that memory holds"),
            ({"num_hidden_layers": 10**9}, r"expected predictor.backbone.from_config.num_hidden_layers <= 4096"),
        ],
    )
    def test_a_base_model_that_no_memory_holds(self, exported: Path, size: dict[str, int], message: str) -> None:
        config = json.loads((exported / SETTINGS_FILE).read_text())["config"]
        entries = {"model_type": "llama", "vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        edit(exported, config=config | {"backbone": config["backbone"] | {"from_config": entries | size}})
        with pytest.raises(ValueError, match=rf"^{exported}: {message}[^\n]*$"):
            load_network(exported)

    @pytest.mark.parametrize(("name", "size"), [("window_length", 10**9), ("ngrams", 10**13)])
    def test_sizes_that_no_memory_holds_are_refused(self, exported: Path, name: str, size: int) -> None:
        config = json.loads((exported / SETTINGS_FILE).read_text())["config"]
        edit(exported, config=config | {name: size})
        with pytest.raises(ValueError, match=rf"^{exported}: [^\n]*expected predictor\.{name} [^\n]*found {size}$"):
            load_network(exported)

    def test_a_class_of_somebody_else(self, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Recipe of an attack: opened from the folder above, `my_adapter/evil.py` would be imported."""
        (exported / "evil.py").write_text(
            "from dataclasses import dataclass\n"
            "from ptp_lightning.models import CosineFeatures\n"
            "@dataclass(frozen=True)\n"
            "class Features(CosineFeatures): ...\n"
        )
        monkeypatch.syspath_prepend(str(exported.parent))
        config = json.loads((exported / SETTINGS_FILE).read_text())["config"]
        config["features"]["class_path"] = f"{exported.name}.evil.Features"
        edit(exported, config=config)
        with pytest.raises(ValueError, match=rf"{exported}: .*'{exported.name}\.evil\.Features'.*trust_custom_classes"):
            load_network(exported)
        assert f"{exported.name}.evil" not in sys.modules
        assert type(load_network(exported, trust_custom_classes=True).config.features).__name__ == "Features"

    @pytest.mark.parametrize("name", [ADAPTER_FILE, SLOT_ENCODER_FILE])
    def test_a_weight_is_missing_or_of_another_shape(self, exported: Path, name: str) -> None:
        weights = load_file(exported / name)
        first = min(weights)
        save_file({key: value for key, value in weights.items() if key != first}, exported / name)
        with pytest.raises(ValueError, match=r"export: expected the \d+ weights of this predictor, found"):
            load_network(exported)
        save_file(weights | {first: torch.zeros(3, 3, 3)}, exported / name)
        with pytest.raises(ValueError, match=r"export: expected .* of shape .* found \[3, 3, 3\]"):
            load_network(exported)


class TestCheckpointFile:
    """Files that no run wrote; real ones are in tests/integration/test_export_command.py."""

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 neither"])
    def test_no_checkpoint(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "last.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"^ckpt_path=.*last\.ckpt cannot be read: [^\n]*$"):
            load_network(tmp_path / "last.ckpt")

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"at .*last\.ckpt, found nothing: set ckpt_path"):
            load_network(tmp_path / "last.ckpt")

    @pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], 7])
    def test_of_another_module(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match=r"checkpoint with a predictor, found .*last\.ckpt without one"):
            load_network(tmp_path / "last.ckpt")

    @pytest.mark.parametrize(
        "content",
        [
            {"predictor": 5, "state_dict": {}},
            {"predictor": {"config": 5}, "state_dict": {}},
            {"predictor": {"config": {}}, "state_dict": 5},
            {"predictor": {"config": {}}, "state_dict": {}},
            {"predictor": {"config": {}, "base_fingerprint": "0", "prefix_counts": 5}, "state_dict": {}},
            {"predictor": {"config": {}, "base_fingerprint": "0"}, "state_dict": {}, "global_step": "x"},
        ],
    )
    def test_entries_of_another_kind(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match=r"^expected [^\n]*last\.ckpt, found [^\n]*: set ckpt_path"):
            load_network(tmp_path / "last.ckpt")

    def test_code_is_not_run(self, tmp_path: Path) -> None:
        torch.save({"predictor": Payload(tmp_path / "run")}, tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
            load_network(tmp_path / "last.ckpt")
        assert not (tmp_path / "run").exists()


class Payload:
    """What a pickle can do."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.file,)
