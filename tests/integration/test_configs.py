"""Every YAML in configs/ is a run that starts: all are built, the small ones take a training and a validation step."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptp_lightning.cli import main
from ptp_lightning.losses import (
    AcceptedLengthWeights,
    BinaryCrossEntropy,
    GeometricWeights,
    JensenShannon,
    Loss,
    PositionWeights,
    ReverseKullbackLeibler,
    TotalVariation,
    UniformWeights,
)
from ptp_lightning.training import DistillationModule
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


ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ROWS: dict[str, dict[str, Any]] = {
    "fineweb_edu": {"text": CORPUS_LINE * 4},
    "code_contests": {"description": "Add.", "solutions": {"language": [3], "solution": [CORPUS_LINE, "no"]}},
    "sharegpt": {"conversations": [{"from": "human", "value": "Add!"}, {"from": "gpt", "value": CORPUS_LINE}]},
    "README": {
        "text": CORPUS_LINE * 4,
        "messages": [{"role": "user", "content": "Add!"}, {"role": "assistant", "content": CORPUS_LINE}],
    },
}


def data_configurations() -> dict[str, str]:
    """Those of configs/data, and the one that the README shows."""
    shown = {path.stem: path.read_text() for path in sorted((ROOT / "configs" / "data").glob("*.yaml"))}
    return shown | {"README": (ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0]}


@pytest.mark.parametrize(("name", "text"), data_configurations().items(), ids=data_configurations().keys())
def test_every_data_configuration_goes_behind_another(
    name: str, text: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With local files of the same shape in place of the hub's."""
    config = yaml.safe_load(text)
    data = config["data"]["init_args"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(ROWS[name]).replace("a + b", f"a + {k}") + "\n" for k in range(9)))
    for part in data["parts"]:
        part["source"] = {"class_path": "ptp_lightning.data.JsonLines", "init_args": {"paths": [str(rows)]}}
        if part.get("rendering", {}).get("class_path", "").endswith("Chat"):
            part["rendering"].setdefault("init_args", {})["template"] = TEMPLATE
    data |= {"row_length": 32, "batch_size": 2, "num_windows": 2, "eval_rows": 2, "eval_parts": data["parts"]}
    data |= {"num_workers": 0, "on_error": "raise"}  # every row has to be usable
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(shrink(ROOT / "configs" / "gated_lora.yaml", corpus, tmp_path))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *run, "--config", str(tmp_path / "data.yaml")])
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


@pytest.mark.parametrize(
    ("objective", "loss", "options", "weights"),
    [
        ("OneHotObjective", BinaryCrossEntropy(), [], AcceptedLengthWeights()),
        ("CategoricalObjective", ReverseKullbackLeibler(floor=1e-4), ["loss.init_args.floor=1e-4"], UniformWeights()),
        ("CategoricalObjective", JensenShannon(), [], AcceptedLengthWeights()),
        (
            "CategoricalObjective",
            TotalVariation(chunk_size=7),
            ["position_weights.init_args.decay=0.8"],
            GeometricWeights(decay=0.8),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_losses_and_position_weights_are_named_by_class_path(
    objective: str,
    loss: Loss,
    options: list[str],
    weights: PositionWeights,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = next(path for path in CONFIGS if path.stem == "gated_lora")
    choices = [
        f"predictor.objective=ptp_lightning.models.{objective}",
        f"loss=ptp_lightning.losses.{type(loss).__name__}",
        f"loss.init_args.chunk_size={loss.chunk_size}",
        f"position_weights=ptp_lightning.losses.{type(weights).__name__}",
        *options,
    ]
    trained: list[DistillationModule] = []
    monkeypatch.setattr(DistillationModule, "on_train_end", lambda module: trained.append(module))
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(shrink(path, corpus, tmp_path))]
    overrides = [f"--model.init_args.{choice}" for choice in choices]
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", *config, *overrides])
    main()
    (module,) = trained
    assert (module.loss, module.position_weights) == (loss, weights)
