"""Every YAML in configs/ is a run that starts: all are built, the small ones take a training and a validation step."""

import sys
from pathlib import Path

import pytest
import yaml

from ptp_lightning.cli import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# A network of the same kind that needs no download, with the tokenizer of the embedded model.
SHRUNKEN = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
CORPUS_LINE = "def add(a, b):\n    return a + b\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One text file, large enough for a row in each split."""
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS_LINE * 400)
    return path


def shrink(path: Path, corpus: Path, folder: Path) -> Path:
    """The configuration at `path` with a tiny network, a tiny corpus and small batches."""
    config = yaml.safe_load(path.read_text())
    arguments = config["model"]["init_args"]
    arguments.get("predictor", arguments)["backbone"] = {"path": "embedded", "from_config": SHRUNKEN}
    if "lora" in arguments.get("predictor", {}):
        arguments["predictor"]["lora"] |= {"rank": 2}
    if "lookup_layers" in arguments.get("predictor", {}):
        arguments["predictor"]["lookup_layers"] = [1]
    if "output" in arguments:
        arguments |= {"output": str(folder / "model"), "compile": False}
    config["data"]["init_args"] |= {
        "corpus": {
            "class_path": "ptp_lightning.data.TextFiles",
            "init_args": {"paths": [str(corpus)], "held_out": "lines"},
        },
        "row_length": 32,
        "batch_size": 2,
        "num_windows": 2,
        "eval_rows": 2,
    }
    config["trainer"] |= {"accelerator": "cpu", "fast_dev_run": 1}
    shrunken = folder / path.name
    shrunken.write_text(yaml.safe_dump(config))
    return shrunken


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
