"""Misspelt classes in configurations: one line with the key, the nearest name, and all names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ptp_lightning.cli import main
from ptp_lightning.sweeps.trial_callbacks import Heartbeat
from ptp_lightning.training.class_names import BASES, ROWS_OF_A_STREAM, concrete_classes, unknown_class

MY_PARTS = """
from dataclasses import dataclass
from ptp_lightning.models import CosineFeatures

@dataclass(frozen=True)
class MyFeatures(CosineFeatures):
    pass
"""
FEATURES = "--model.init_args.predictor.features"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The first line of the error of `fit`, as the installed script runs it in a folder with `my_parts.py`."""
    (tmp_path / "my_parts.py").write_text(MY_PARTS)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)  # of the documentation
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def refused(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", "gated_lora", *options])
        with pytest.raises(SystemExit):
            main()
        first, tip = capsys.readouterr().err.splitlines()
        assert tip.startswith("tip: ")
        return first

    return refused


def test_a_class_of_the_current_folder(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found; its misspelt name and that of its module are noticed."""
    error = refused(FEATURES, "my_parts.MyFeatrues")
    assert "found my_parts.MyFeatrues: did you mean my_parts.MyFeatures? There are " in error
    assert "class of AuxiliaryFeatures for predictor.features" in error
    assert "SawtoothFeatures, ScaleFreeCosineFeatures, ThresholdFeatures of ptp_lightning.models" in error
    error = refused(FEATURES, "my_part.MyFeatures")
    assert "found my_part.MyFeatures: did you mean my_parts.MyFeatures?" in error
    monkeypatch.delitem(sys.modules, "my_parts")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--trainer.callbacks+", "ptp_lightning.training.callbacks.LogProgres"],
            "expected a class of Callback for trainer.callbacks, found ptp_lightning.training.callbacks.LogProgres: "
            "did you mean ptp_lightning.training.callbacks.LogProgress? There are FinalMetrics, ",
        ),
        (
            ["--trainer.callbacks", "[{class_path: lightning.pytorch.callbacks.DeviceStatMonitor}]"],
            "found lightning.pytorch.callbacks.DeviceStatMonitor: did you mean "
            "lightning.pytorch.callbacks.DeviceStatsMonitor? There are FinalMetrics, ",
        ),
        (
            ["--trainer.logger", "CSVLoger"],
            "expected a class of Logger for trainer.logger, found CSVLoger: did you mean "
            "lightning.pytorch.loggers.CSVLogger? There are OverviewTensorBoardLogger of "
            "ptp_lightning.training.loggers, and CSVLogger, ",
        ),
    ],
    ids=["callback", "callback in a list", "logger"],
)
def test_a_class_of_the_trainer(refused, options: list[str], expected: str) -> None:
    error = refused(*options)
    assert expected in error
    assert Heartbeat.__name__ not in error  # which studies use, and configurations do not


def message(key: str, reason: str) -> str:
    return f'Parser key "model": Parser key "{key}":\n  {reason}\n'


@pytest.mark.parametrize(
    ("key", "reason", "expected"),
    [
        (
            "loss",
            "Problem with given class_path 'ptp_lightning.losses.KullbakLeibler':\n  module 'ptp_lightning.losses' has "
            "no attribute 'KullbakLeibler'",
            "class of Loss for loss, found ptp_lightning.losses.KullbakLeibler: did you mean "
            "ptp_lightning.losses.KullbackLeibler?",
        ),
        (
            "predictor.features",
            "Import path ptp_lightning.losses.KullbackLeibler does not correspond to a subclass of AuxiliaryFeatures",
            "found ptp_lightning.losses.KullbackLeibler: it is of another kind. There are ArithmeticFeatures",
        ),
        ("model", "Expected a dot import path string: Distillation", "mean ptp_lightning.training.DistillationModule?"),
        (
            "source",
            "Expected a dot import path string: Nothing",
            "of WindowSource for source, found Nothing: it does not exist.",
        ),
        (
            "data.parts.source",
            "Problem with given class_path 'a.HubRow':\n  No module named 'a'",
            "class of RowSource for data.parts.source, found a.HubRow: did you mean ptp_lightning.data.HubRows?",
        ),
    ],
)
def test_one_line(key: str, reason: str, expected: str) -> None:
    found = unknown_class(message(key, reason))
    assert found is not None and expected in found and "\n" not in found


@pytest.mark.parametrize("reason", ["expected rank > 0, found 0", "Problem with given class_path 'a.B':\n bits >= 1"])
def test_other_errors_stay(reason: str) -> None:
    assert unknown_class(message("predictor.lora", reason)) is None


@pytest.mark.parametrize("place", [*BASES.values(), ROWS_OF_A_STREAM])
def test_bases_are_exported_beside_their_implementations(place: str) -> None:
    package, _, name = place.rpartition(".")
    module = sys.modules[f"ptp_lightning.{package}"]
    assert name in getattr(module, "__all__", vars(module))
    assert [one for one in concrete_classes(getattr(module, name)) if one.__module__.startswith("ptp_lightning.")]
