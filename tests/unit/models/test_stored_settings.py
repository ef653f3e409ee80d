"""What trained slots are bound to besides their weights: order, range, and the names of their classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptp_lightning.export.checkpoint import load_network, require_same_predictor, save_network
from ptp_lightning.export.migrations import migrate_checkpoint
from ptp_lightning.export.stored_predictor import SLOT_ENCODER_FILE
from ptp_lightning.models import BinaryFeatures, CosineFeatures, OneHotObjective, PredictorConfig, slot_parts
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.models.students import FullCopyStudent
from tests.helpers.stored_predictors import SAMPLING, slot_logits, trained


class TestOrderAndRange:
    """What else slots are bound to: the token order they learned in, and the settings they are told."""

    BY_EMBEDDING = replace(SAMPLING, order="embedding")
    RANGE = SamplingRange(0.5, 1.0, 0.1, (5, None), (0.9,))

    def test_come_back(self, base: Path, tmp_path: Path) -> None:
        before = trained(base, sampling=self.BY_EMBEDDING, sampling_range=self.RANGE)
        save_network(before, tmp_path / "export", dtype=torch.bfloat16)
        after = load_network(tmp_path / "export")
        assert after.config == before.config
        places = after.slot_encoder.token_ranks
        assert places is not None and places.dtype == torch.int64
        assert torch.equal(places, before.sampler().token_ranks)  # pyright: ignore[reportArgumentType]
        save_network(trained(base, sampling=self.BY_EMBEDDING, sampling_range=self.RANGE), tmp_path / "exact")
        assert torch.equal(slot_logits(load_network(tmp_path / "exact")), slot_logits(before))

    def test_the_stored_order_is_used_whatever_this_machine_would_compute(
        self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = trained(base, sampling=self.BY_EMBEDDING)
        assert before.slot_encoder.token_ranks is not None
        other = before.slot_encoder.token_ranks.flip(0).clone()
        before.slot_encoder.token_ranks.copy_(other)
        save_network(before, tmp_path / "export")
        monkeypatch.setattr(slot_parts, "similar_tokens_together", lambda table: pytest.fail("computed"))
        after = load_network(tmp_path / "export")
        assert torch.equal(after.sampler().token_ranks, other)  # pyright: ignore[reportArgumentType]

    @pytest.mark.parametrize(
        ("places", "message"),
        [
            (None, "expected the token order of predictor.sampling.order 'embedding', found none"),
            (torch.zeros(64, dtype=torch.int64), "a permutation of 0 .. 63, found 64 numbers"),
            (torch.arange(63), "a permutation of 0 .. 63, found 63 numbers"),
        ],
        ids=["missing", "no permutation", "of another vocabulary"],
    )
    def test_a_broken_order_is_refused(self, base: Path, tmp_path: Path, places: Tensor | None, message: str) -> None:
        save_network(trained(base, sampling=self.BY_EMBEDDING), tmp_path / "export")
        weights = load_file(tmp_path / "export" / SLOT_ENCODER_FILE)
        del weights["token_ranks"]
        save_file(
            weights if places is None else weights | {"token_ranks": places}, tmp_path / "export" / SLOT_ENCODER_FILE
        )
        with pytest.raises(ValueError, match=message):
            load_network(tmp_path / "export")

    @pytest.mark.parametrize(
        ("change", "key"), [({"sampling": BY_EMBEDDING}, "order"), ({"sampling_range": RANGE}, "range")]
    )
    def test_weights_of_another_kind_are_refused(self, base: Path, change: dict[str, Any], key: str) -> None:
        plain, other = trained(base), trained(base, **change)
        for predictor, state in ((plain, other.trainable_state()), (other, plain.trainable_state())):
            with pytest.raises(ValueError, match=f"found a checkpoint that differs in .*set .*{key}"):
                predictor.load_trainable_state(state)

    def test_card(self, base: Path, tmp_path: Path) -> None:
        save_network(trained(base, sampling=self.BY_EMBEDDING, sampling_range=self.RANGE), tmp_path / "export")
        card = (tmp_path / "export" / "README.md").read_text()
        assert "embedding order" in card
        assert "| Trained for | `SamplingRange(min_temperature=0.5, max_temperature=1.0," in card


@pytest.mark.parametrize("home", ["auxiliary_embedding", "auxiliary_features", "continuous_features"])
@pytest.mark.parametrize("features", [CosineFeatures(num_frequencies=3), BinaryFeatures(bits=5)])
def test_features_keep_the_names_of_older_adapters(base: Path, features: AuxiliaryFeatures, home: str) -> None:
    """They once stood in other files; a configuration of today goes on from there."""
    predictor = trained(base, features=features)
    config = predictor.config.to_dict()
    config["features"]["class_path"] = f"ptp_lightning.models.{home}.{type(features).__name__}"
    assert PredictorConfig.from_dict(config) == predictor.config
    stored = {"config": config, "base_fingerprint": predictor.base_fingerprint}
    require_same_predictor({"predictor": stored}, predictor)


def test_classes_are_stored_by_their_public_names() -> None:
    """Files may be moved; what was stored before goes on to load."""
    config = PredictorConfig(objective=OneHotObjective(), features=BinaryFeatures(), student=FullCopyStudent())
    plain = config.to_dict()
    assert [plain[key]["class_path"] for key in ("objective", "features", "student")] == [
        *("ptp_lightning.models.OneHotObjective", "ptp_lightning.models.BinaryFeatures"),
        "ptp_lightning.models.FullCopyStudent",
    ]
    assert PredictorConfig.from_dict(plain) == config


class TestDeletedLayers:
    """A refiner once could have copied layers, or read what the base model's first layers make of a draft."""

    def test_an_export_without_them_is_read(self, base: Path, tmp_path: Path) -> None:
        before = trained(base)
        save_network(before, tmp_path / "export")
        self.store(tmp_path / "export", base_layers=0, start="random")
        after = load_network(tmp_path / "export")
        assert after.config == before.config
        assert torch.equal(slot_logits(after), slot_logits(before))

    @pytest.mark.parametrize("setting", [{"base_layers": 4}, {"start": "last_layers"}])
    def test_files_with_them_are_refused(self, base: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
        save_network(trained(base), tmp_path / "export")
        config = self.store(tmp_path / "export", **setting)
        ((name, value),) = setting.items()
        key = rf"expected no correction\.init_args\.{name}, found {value}: version 0.2 has no such .*version 0.1$"
        with pytest.raises(ValueError, match=rf"^{tmp_path}/export/predictor.json: {key}"):
            load_network(tmp_path / "export")
        with pytest.raises(ValueError, match=rf"^last.ckpt: {key}"):
            migrate_checkpoint({"predictor": {"config": config}, "state_dict": {}}, "last.ckpt")

    def store(self, folder: Path, **settings: Any) -> dict[str, Any]:
        """Write settings of the refiner into `predictor.json`; returns the whole configuration."""
        file = folder / "predictor.json"
        about = json.loads(file.read_text())
        about["config"]["correction"]["init_args"] |= settings
        file.write_text(json.dumps(about))
        return about["config"]
