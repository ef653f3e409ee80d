"""A stored configuration may name this package's classes only: nothing else is imported."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ptp_lightning.models import CosineFeatures, PredictorConfig

EVIL = "my_adapter.evil.Features"
OURS = "ptp_lightning.models.CosineFeatures"


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists as soon as the module `my_adapter.evil` is imported."""
    proof = tmp_path / "proof"
    (tmp_path / "my_adapter").mkdir()
    (tmp_path / "my_adapter" / "evil.py").write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "from dataclasses import dataclass\n"
        "from ptp_lightning.models import CosineFeatures\n"
        "@dataclass(frozen=True)\n"
        "class Features(CosineFeatures): ...\n"
    )
    (tmp_path / "evil.yaml").write_text(f"class_path: {EVIL}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_adapter", "my_adapter.evil"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return proof


NAMED = {"class_path": EVIL}
HOSTILE: dict[str, dict[str, Any]] = {
    "features": {"features": NAMED},
    "objective": {"objective": NAMED},
    "student": {"student": NAMED},
    "the name alone": {"features": EVIL},
    "the name of a data class": {"lora": EVIL},
    "a data class": {"sampling": NAMED},
    "a file": {"features": "evil.yaml"},
    "a dotted key": {"features.class_path": EVIL},
    "a dotted key inside": {"features": {"class_path": OURS, "init_args.x": NAMED}},
    "inside our class": {"features": {"class_path": OURS, "init_args": {"num_frequencies": NAMED}}},
    "inside a backbone": {"backbone": {"from_config": {"model_type": "llama", "x": [NAMED]}}},
    "not a name": {"features": {"class_path": [EVIL]}},
    "below our package": {"features": {"class_path": "ptp_lightning.models.my_adapter.Features"}},
    "another class of ours": {"features": {"class_path": "ptp_lightning.training.cli.TrainingCLI"}},
    "unknown": {"unknown": NAMED},
}


@pytest.mark.parametrize("entry", HOSTILE.values(), ids=HOSTILE.keys())
def test_other_classes_are_refused_before_their_import(entry: dict[str, Any], imported: Path) -> None:
    with pytest.raises(ValueError, match=r"^expected "):
        PredictorConfig.from_dict(PredictorConfig().to_dict() | entry)
    assert not imported.exists()


def test_the_error_names_the_class_and_the_option(imported: Path) -> None:
    with pytest.raises(ValueError, match=rf"'{EVIL}'.*set trust_custom_classes"):
        PredictorConfig.from_dict(PredictorConfig().to_dict() | {"features": NAMED})


@pytest.mark.parametrize("trusted", [{EVIL}, None], ids=["this one", "all"])
def test_a_class_that_is_trusted(trusted: set[str] | None, imported: Path) -> None:
    config = PredictorConfig.from_dict(PredictorConfig().to_dict() | {"features": NAMED}, trusted_classes=trusted)
    assert imported.exists()
    assert type(config.features).__name__ == "Features"
    assert isinstance(config.features, CosineFeatures)
    assert EVIL in config.class_paths()


def test_our_classes_by_the_files_where_they_stand() -> None:
    plain = PredictorConfig().to_dict()
    plain["features"] = {"class_path": f"{CosineFeatures.__module__}.CosineFeatures", "init_args": {}}
    assert PredictorConfig.from_dict(plain) == PredictorConfig()
