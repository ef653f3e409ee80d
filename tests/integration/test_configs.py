"""Every YAML in configs/ is a run that starts: all are built, the small ones take a training and a validation step."""

import sys
from pathlib import Path

import pytest
import yaml

from ptp_lightning.cli import main
from tests.tiny_configs import CORPUS_LINE, shrink

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One text file, large enough for a row in each split."""
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS_LINE * 400)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_trains_and_validates(
    path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes, arguments and pairings of the file are right, whatever the size of the network behind it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", str(shrink(path, corpus, tmp_path))])
    main()


@pytest.mark.parametrize(("name", "rank"), [("tinyllama", 256), ("vicuna", 128)])
def test_the_papers_settings(name: str, rank: int) -> None:
    """Draxler et al., ICLR 2026: AdamW 1e-4 after 1000 warm-up steps, 128 windows of 16 a row, T 0.7."""
    config = yaml.safe_load(next(path for path in CONFIGS if path.stem == name).read_text())
    arguments = config["model"]["init_args"]
    assert arguments["predictor"]["lora"]["rank"] == rank
    assert arguments["predictor"]["window_length"] == 16
    sampling = arguments["predictor"]["sampling"]
    assert (sampling["temperature"], sampling["top_k"], sampling["top_p"]) == (0.7, 50, 0.9)
    assert (arguments["optimizer"]["learning_rate"], arguments["optimizer"]["warmup_steps"]) == (1e-4, 1000)
    assert config["data"]["init_args"]["num_windows"] == 128
