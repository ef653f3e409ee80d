"""Configurations and studies are found by name from any folder, in a checkout and in a wheel."""

import tomllib
from pathlib import Path

import pytest
import yaml

from ptp_lightning.utils import named_files
from ptp_lightning.utils.named_files import find_yaml, shipped_folder, shipped_names

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["losses", "losses.yaml", "sweeps/losses.yaml", "sweeps/losses"])
def test_a_study_is_found_from_any_folder(name: str) -> None:
    assert find_yaml(name, "sweeps") == ROOT / "sweeps" / "losses.yaml"


@pytest.mark.parametrize("name", ["strategy/ddp", "configs/strategy/ddp.yaml"])
def test_a_configuration_in_a_folder_is_found(name: str) -> None:
    assert find_yaml(name, "configs") == ROOT / "configs" / "strategy" / "ddp.yaml"


def test_a_file_at_the_path_comes_first(tmp_path: Path) -> None:
    Path("losses.yaml").touch()
    assert find_yaml("losses.yaml", "sweeps") == Path("losses.yaml")
    assert find_yaml(str(tmp_path / "losses.yaml"), "sweeps") == tmp_path / "losses.yaml"


@pytest.mark.parametrize("name", ["none", "../configs/gated_lora.yaml", "/losses.yaml", "sweeps", "", "a: 1\n" * 999])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert find_yaml(name, "sweeps") == Path(name)


def test_names_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has them in the folders that pyproject.toml says."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for kind, inside in wheel["sources"].items():
        (tmp_path / inside).mkdir(parents=True)
        (tmp_path / inside / "one.yaml").touch()
        assert kind in wheel["only-include"]
    monkeypatch.setattr(named_files.resources, "files", lambda package: tmp_path / package)
    assert [shipped_names(kind) for kind in ("configs", "sweeps")] == [["one"], ["one"]]
    assert find_yaml("one", "sweeps").parent == tmp_path / "ptp_lightning" / "shipped" / "sweeps"


def test_studies_find_their_configurations_in_a_wheel() -> None:
    """Both folders lie side by side there, as in a checkout."""
    for study in shipped_folder("sweeps").glob("*.yaml"):
        assert (study.parent / yaml.safe_load(study.read_text())["base"]).is_file()
