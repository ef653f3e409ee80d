"""Loggers of all kinds, together and alone: settings and metrics arrive, and files stay in the folder of the run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sqlite3
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ptp_lightning.training import cli
from ptp_lightning.training.loggers.overview import OVERVIEW
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

ROOT = Path(__file__).parents[2]
TENSORBOARD = {
    "class_path": "ptp_lightning.training.loggers.OverviewTensorBoardLogger",
    "init_args": {"save_dir": "runs", "name": "tiny", "default_hp_metric": False},
}
CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv", "name": "tiny"}}
SETTINGS = {"lora.rank": 2, "objective": "OneHotObjective", "max_steps": 2}


def fit(folder: Path, logger: Any, *options: str) -> None:
    """Two steps of a tiny network, a validation after each."""
    corpus = folder / "corpus.txt"
    corpus.write_text(CORPUS_LINE * 100)
    config = shrink(ROOT / "configs" / "gated_lora.yaml", corpus, folder)
    trainer: dict[str, Any] = {"fast_dev_run": False, "max_steps": 2, "val_check_interval": 1, "log_every_n_steps": 1}
    trainer |= {"logger": logger, "enable_progress_bar": False}
    (folder / "loggers.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    cli.run(["fit", "--config", str(config), "--config", "loggers.yaml", *options])


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run has used TensorBoard and CSV together."""
    folder = tmp_path_factory.mktemp("loggers")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        fit(folder, [TENSORBOARD, CSV])
    return folder


def test_the_run_has_one_folder_and_each_logger_its_own(folder: Path) -> None:
    inputs = {"corpus.txt", "gated_lora.yaml", "loggers.yaml"}
    files = {name for name in files_in(folder) - inputs if "tfevents" not in name}
    assert files == {
        "runs/tiny/version_0/checkpoints/last.ckpt",
        "runs/tiny/version_0/config.yaml",
        "runs/tiny/version_0/hparams.yaml",
        "csv/tiny/version_0/hparams.yaml",
        "csv/tiny/version_0/metrics.csv",
    }


def test_settings_and_metrics_reach_all_loggers(folder: Path) -> None:
    for path in ("runs/tiny/version_0", "csv/tiny/version_0"):
        settings = yaml.safe_load((folder / path / "hparams.yaml").read_text())
        assert {name: settings[name] for name in SETTINGS} == SETTINGS
    header = (folder / "csv/tiny/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/correct_tokens", "train/loss_nats", "perf/tokens_per_second", "train/learning_rate"} <= set(header)


def test_tensorboard_begins_with_the_headline_and_ends_with_epoch_and_learning_rate(folder: Path) -> None:
    events = EventAccumulator(str(folder / "runs/tiny/version_0"), size_guidance={"tensors": 0}).Reload()
    tags = sorted(events.Tags()["scalars"])
    headline = sorted(OVERVIEW[tag] for tag in tags if tag in OVERVIEW)
    assert headline[:2] == ["Overview/correct_tokens", "Overview/training_loss_nats"]
    assert tags[: len(headline)] == headline
    assert tags[-2:] == ["z_schedule/epoch", "z_schedule/learning_rate"]
    for tag, shown in OVERVIEW.items():
        if tag in tags:
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            assert points == [(event.step, event.value) for event in events.Scalars(shown)]
    assert not any("/kl/" in tag for tag in tags)  # a one-hot student has no divergence


def test_tensorboard_has_a_sample_marked_by_calls(folder: Path) -> None:
    events = EventAccumulator(str(folder / "runs/tiny/version_0"), size_guidance={"tensors": 0}).Reload()
    (sample,) = events.Tensors("run/sample/text_summary")
    text = sample.tensor_proto.string_val[0].decode()
    cost, _, marked = text.partition("\n\n")
    assert "tokens in" in cost and "calls" in cost
    assert CORPUS_LINE.splitlines()[1].strip() in marked and "|" in marked and "~~" in marked
    assert all(line.startswith("    ") for line in marked.splitlines())


def load_screenshots() -> ModuleType:
    """The command that takes the screenshots of the documentation."""
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "tensorboard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCREENSHOTS = load_screenshots()


def fetch(address: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    return urlopen(Request(address, data, {"Content-Type": "application/json"})).read().decode()


@pytest.mark.skipif(SCREENSHOTS.find_browser() is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_run(folder: Path) -> None:
    """The page as it is drawn; and what TensorBoard sends to its tabs."""
    browser = SCREENSHOTS.find_browser()
    try:
        SCREENSHOTS.browse(browser, "about:blank", "--dump-dom")
    except subprocess.SubprocessError as error:
        pytest.skip(f"Chromium does not run here: {error}")
    with SCREENSHOTS.tensorboard(folder / "runs") as address:
        page = SCREENSHOTS.browse(browser, f"{address}/#timeseries", "--dump-dom")
        shown = re.findall(r'title="((?:Overview|perf|train|val|z_schedule)\b[^"]*)"', page)
        first, second, *_ = [title for title in shown if title.startswith("Overview/")]
        assert (first, second) == ("Overview/correct_tokens", "Overview/training_loss_nats")
        assert [title for title in shown if "/" not in title] == ["Overview", "perf", "train", "val", "z_schedule"]
        plugins = f"{address}/data/plugin"
        run = "run=tiny/version_0"
        assert {"val/by_position", "val/accuracy_by_step"} <= json.loads(fetch(f"{plugins}/images/tags"))[
            "tiny/version_0"
        ].keys()
        sample = json.loads(fetch(f"{plugins}/text/text?{run}&tag=run/sample/text_summary"))[0]["text"]
        assert "<pre><code>" in sample and "~~" in sample
        results = json.loads(fetch(f"{plugins}/text/text?{run}&tag=run/results/text_summary"))[0]["text"]
        assert "correct tokens of a window" in results and "<table>" in results
        experiment = json.loads(fetch(f"{plugins}/hparams/experiment", {"experimentName": ""}))
        assert SETTINGS.keys() <= {info["name"] for info in experiment["hparamInfos"]}
        assert "val/correct_tokens" in {info["name"]["tag"] for info in experiment["metricInfos"]}


def test_without_a_logger_nothing_is_written_but_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, False)
    new = files_in(tmp_path) - {"corpus.txt", "gated_lora.yaml", "loggers.yaml"}
    assert new == {"runs/checkpoints/last.ckpt"}
    fit(tmp_path, False, "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert len(files_in(tmp_path)) == 4  # a resumed run goes on in the same folder


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: pip install -e '.[loggers]'")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": "wb", "project": "tiny", "offline": True},
    }
    fit(tmp_path, logger)
    importlib.import_module("wandb").finish()  # otherwise the next one in this process is the same run
    fit(tmp_path, logger, "--ckpt_path", "last", "--trainer.max_steps", "3")
    importlib.import_module("wandb").teardown()  # writes what is buffered
    folders = [config.parent for config in (tmp_path / "wb" / "tiny").glob("*/config.yaml")]
    assert [[file.name for file in (folder / "checkpoints").iterdir()] for folder in folders] == [["last.ckpt"]] * 2
    steps = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] for folder in folders]
    assert sorted(steps) == [2, 3]
    logs = [log.read_bytes() for log in (tmp_path / "wb" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(logs) == 2 and all(b"lora.rank" in log and b"val/correct_tokens" in log for log in logs)
    inputs = {"corpus.txt", "gated_lora.yaml", "loggers.yaml"}
    assert {name.split("/")[0] for name in files_in(tmp_path)} == {"wb", *inputs}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow: pip install -e '.[loggers]'")
def test_mlflow_with_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"tracking_uri": "sqlite:///mlflow.db", "experiment_name": "tiny"}
    fit(tmp_path, {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": arguments})
    with sqlite3.connect("mlflow.db") as database:
        settings = dict(database.execute("select key, value from params"))
        metrics = {key for (key,) in database.execute("select distinct key from metrics")}
    assert {name: settings[name] for name in SETTINGS} == {name: str(value) for name, value in SETTINGS.items()}
    assert {"val/correct_tokens", "train/loss_nats"} <= metrics
    (config,) = (tmp_path / "runs").glob("*/*/config.yaml")
    assert [file.name for file in (config.parent / "checkpoints").iterdir()] == ["last.ckpt"]
