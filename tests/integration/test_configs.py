"""Every YAML in configs/ is a run that starts: all are built, the small ones take a training and a validation step."""

import re
import sys
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptp_lightning.cli import main
from ptp_lightning.data import Chat
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
from ptp_lightning.training.distributed.checkpoint_io import AtomicCheckpointIO
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_configs import CORPUS_LINE, localize, shrink

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
    """Classes, arguments and pairings of the file are correct, whatever the size of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", str(shrink(path, corpus, tmp_path))])
    main()
    assert not (tmp_path / "checkpoints").exists()  # nothing is written outside of the run's own folder


ROOT = Path(__file__).parents[2]
POSITIONS = {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": 2048, "lmsys/vicuna-7b-v1.3": 2048}


def data_configurations() -> dict[str, str]:
    """Those of configs/data, and the one that the documentation shows."""
    shown = {path.stem: path.read_text() for path in sorted((ROOT / "configs" / "data").glob("*.yaml"))}
    page = (ROOT / "docs" / "how_to" / "your_data.md").read_text()
    return shown | {"your_data": page.split("```yaml\n")[1].split("```")[0]}


def test_rows_and_windows_have_room_in_the_models() -> None:
    """Of the model of the configuration, and of the one that a comment puts before it."""
    paths = [path for path in (ROOT / "configs").rglob("*.yaml") if "StreamingCorpus" in path.read_text()]
    assert len(paths) == 5
    for text in (path.read_text().replace("configs/data/", "") for path in paths):
        (before,) = set(re.findall(r"configs/(\w+)\.yaml", text))
        model = yaml.safe_load((ROOT / "configs" / f"{before}.yaml").read_text())["model"]["init_args"]["predictor"]
        row_length = yaml.safe_load(text)["data"]["init_args"]["row_length"]
        assert row_length + model["window_length"] <= POSITIONS[model["backbone"]["path"]]


@pytest.mark.parametrize("text", data_configurations().values(), ids=data_configurations().keys())
def test_every_data_configuration_follows_another(
    text: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With local files of the same shape instead of the hub's."""
    config = yaml.safe_load(text)
    data = config["data"]["init_args"]
    localize(data, tmp_path)
    data |= {"row_length": 32, "batch_size": 2, "num_windows": 2, "eval_rows": 2}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    run = ["fit", "--config", str(shrink(ROOT / "configs" / "gated_lora.yaml", corpus, tmp_path))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *run, "--config", str(tmp_path / "data.yaml")])
    main()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_strategies_follow_another_configuration(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What processes do together is tested in tests/distributed."""
    paths = [str(ROOT / "configs" / file) for file in ("gated_lora.yaml", f"strategy/{name}.yaml")]
    monkeypatch.setattr(
        sys, "argv", ["ptp_lightning", "fit", "--config", paths[0], "--config", paths[1], "--print_config"]
    )
    with pytest.raises(SystemExit, match="0"):
        main()
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["devices"], trainer["max_steps"]) == ("auto", 260)
    assert "ddp" in str(trainer["strategy"]) if name == "ddp" else "FullyShardedStrategy" in str(trainer["strategy"])


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("activation_checkpointing", "ptp_lightning.models.layers.activation_checkpointing.checkpoint"),
        ("compile", "ptp_lightning.models.layers.compile.torch.compile"),
    ],
)
def test_options_of_layers_follow_another_configuration(
    name: str, called: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[bool] = []

    def run(function: Callable[..., Any], **_: Any) -> Any:
        """As the function called would: what it runs, or a function that runs it."""
        if name == "compile":
            return lambda *args, **kwargs: runs.append(True) or function(*args, **kwargs)
        return runs.append(True) or function()

    first = ROOT / "configs" / "code_categorical.yaml"
    second = ROOT / "configs" / "strategy" / f"{name}.yaml"
    monkeypatch.setattr(called, run)
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(shrink(first, corpus, tmp_path)), "--config", str(second)]
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *words])
    main()
    assert runs


def test_checkpoints_appear_complete_or_not_at_all(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every configuration."""
    found: list[object] = []
    monkeypatch.setattr(
        DistillationModule, "on_train_end", lambda module: found.append(module.trainer.strategy.checkpoint_io)
    )
    monkeypatch.chdir(tmp_path)
    path = shrink(ROOT / "configs" / "gated_lora.yaml", corpus, tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", str(path)])
    main()
    assert [type(io) for io in found] == [AtomicCheckpointIO]


def test_vicuna_gets_the_template_of_its_training() -> None:
    """The format of FastChat's `vicuna_v1.1`; the loss covers the assistant's turns with their ends."""
    config = yaml.safe_load((ROOT / "configs" / "vicuna.yaml").read_text())
    (part,) = config["data"]["init_args"]["parts"]
    said = [("user", "Hi?"), ("assistant", "Yo."), ("user", "So?"), ("assistant", "No.")]
    row = {"messages": [{"role": role, "content": words} for role, words in said]}
    tokenizer = byte_tokenizer()
    ids, learned = astuple(Chat(**part["rendering"]["init_args"]).document(row, tokenizer))
    assert tokenizer.decode(ids[:-1]) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi? ASSISTANT: Yo.</s>USER: So? ASSISTANT: No.</s>"
    )
    answers = [token for token, is_learned in zip(ids[:-1], learned, strict=False) if is_learned]
    assert tokenizer.decode(answers) == " Yo.</s> No.</s>"


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
        # Slow: tests/integration/test_combinations.py names these in a file.
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("OneHotObjective", BinaryCrossEntropy(), [], AcceptedLengthWeights()),
                (
                    "CategoricalObjective",
                    ReverseKullbackLeibler(floor=1e-4),
                    ["loss.init_args.floor=1e-4"],
                    UniformWeights(),
                ),
                ("CategoricalObjective", JensenShannon(), [], AcceptedLengthWeights()),
            )
        ),
        (
            "CategoricalObjective",
            TotalVariation(chunk_size=7),
            ["loss.init_args.chunk_size=7", "position_weights.init_args.decay=0.8"],
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
