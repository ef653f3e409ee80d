"""Settings out of their range end a command in one line that names the key, before a model is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptp_lightning.cli import main
from ptp_lightning.models import network
from ptp_lightning.training.settings import ACCELERATORS
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

CONFIG = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"
MODEL, PREDICTOR = "--model.init_args", "--model.init_args.predictor"

REFUSED: dict[str, tuple[list[str], str]] = {
    "steps": (["--trainer.max_steps", "-5"], "expected trainer.max_steps >= -1, found -5"),
    "epochs": (["--trainer.max_epochs", "-3"], "expected trainer.max_epochs >= -1, found -3"),
    "devices": (["--trainer.devices", "0"], "expected trainer.devices auto, a number from one on, or indices, found 0"),
    "indices of a CPU": (
        ["--trainer.accelerator", "cpu", "--trainer.devices", "[5]"],
        "expected trainer.devices auto or a number of processes from one on, because a CPU has no indices, found [5]",
    ),
    "all devices of a CPU": (
        ["--trainer.accelerator", "cpu", "--trainer.devices=-1"],
        "expected trainer.devices auto or a number of processes from one on, because a CPU has no indices, found -1",
    ),
    "no epochs": (
        ["--trainer.check_val_every_n_epoch", "0"],
        "expected trainer.check_val_every_n_epoch >= 1, found 0",
    ),
    "part of an epoch": (
        ["--trainer.val_check_interval", "0.25"],
        "error: expected a whole number of steps for trainer.val_check_interval, found 0.25",
    ),
    "accelerator": (
        ["--trainer.accelerator", "gpu"],
        "expected a trainer.accelerator that this machine has, found gpu",
    ),
    "validation": (["--trainer.val_check_interval", "0"], "expected trainer.val_check_interval > 0, found 0"),
    "accumulation": (
        ["--trainer.accumulate_grad_batches", "0"],
        "expected trainer.accumulate_grad_batches >= 1, found 0",
    ),
    "clipping": (["--trainer.gradient_clip_val", "-1"], "expected trainer.gradient_clip_val >= 0, found -1"),
    "clipping by NaN": (["--trainer.gradient_clip_val", ".nan"], "expected trainer.gradient_clip_val >= 0, found nan"),
    "search": (
        ["--trainer.callbacks+", "lightning.pytorch.callbacks.LearningRateFinder"],
        "expected trainer.callbacks that observe a run, found LearningRateFinder",
    ),
    "unfreezing": (
        ["--trainer.callbacks+", "lightning.pytorch.callbacks.BackboneFinetuning"],
        "expected trainer.callbacks that observe a run, found BackboneFinetuning",
    ),
    "averages without epochs": (
        ["--trainer.callbacks+", "lightning.pytorch.callbacks.StochasticWeightAveraging",
         "--trainer.callbacks.swa_lrs", "0.01"],
        "expected trainer.limit_train_batches, the number of batches of an epoch, beside StochasticWeightAveraging",
    ),
    "rate": ([f"{MODEL}.optimizer.learning_rate", ".inf"], "expected a finite optimizer.learning_rate > 0, found inf"),
    "rate NaN": ([f"{MODEL}.optimizer.learning_rate", ".nan"], "a finite optimizer.learning_rate > 0, found nan"),
    "betas": ([f"{MODEL}.optimizer.betas", "[1.5, 0.9]"], "optimizer.betas from 0 to below 1, found [1.5, 0.9]"),
    "scale of the adapter": (
        [f"{PREDICTOR}.lora.alpha", ".inf"],
        "expected a finite predictor.lora.alpha > 0, found inf",
    ),
    "decay": ([f"{MODEL}.optimizer.weight_decay", ".inf"], "expected optimizer.weight_decay >= 0, found inf"),
    **{
        f"null {key.rpartition('.')[2]}": ([key, "null"], f"expected settings of {key.removeprefix('--')}, found null")
        for key in (
            *(f"{MODEL}.{name}" for name in ("source", "loss", "optimizer", "predictor")),
            *(f"{PREDICTOR}.{name}" for name in ("sampling", "lora", "backbone", "objective", "features", "student")),
            "--data.init_args.corpus",
            "--data",
        )
    },
    "precision": (["--trainer.precision", "17"], "expected one of 64, 32, 16, transformer-engine,"),
    "words as steps": (["--trainer.max_steps", "many"], "expected int for trainer.max_steps, found many"),
    "names of devices": (["--trainer.devices", "x.y"], "a number from one on, or indices, found x.y"),
    "fraction": ([f"{PREDICTOR}.window_length", "2.5"], "expected int for predictor.window_length, found 2.5"),
    "windows": (
        [f"{PREDICTOR}.window_length", "1000000000"],
        "expected predictor.window_length <= 4096, found 1000000000",
    ),
    "n-grams": (
        [f"{PREDICTOR}.ngrams", "10000000000000"],
        "expected predictor.ngrams null or in 1 .. 1048576, found 10000000000000",
    ),
    "rank": ([f"{PREDICTOR}.lora.rank", "1000000"], "expected predictor.lora.rank in 1 .. 4096, found 1000000"),
    "optimizer": ([f"{MODEL}.optimizer.name", "sgd"], "expected one of adamw, muon for optimizer.name, found sgd"),
    "callbacks": (["--trainer.callbacks", "3"], "expected one of list, a class path for trainer.callbacks, found 3"),
    "abbreviation": (["--trainer.max_step", "3"], "--trainer.max_step"),
    "abbreviation with =": (["--trainer.max_st=3"], "--trainer.max_st=3"),
    "abbreviated command": (["--ckpt", "last"], "--ckpt"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny `config.yaml`."""
    folder = tmp_path_factory.mktemp("refused")
    corpus = folder / "corpus.txt"
    corpus.write_text(CORPUS_LINE * 400)
    plain = yaml.safe_load(shrink(CONFIG, corpus, folder).read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    return folder


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that ends a command, which builds no model."""
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *arguments])
    monkeypatch.setattr(network, "load_backbone", lambda settings: pytest.fail("a model is built"))
    with pytest.raises(SystemExit, match="2"):
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Seed set", "tip: "))]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(
    options: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(ACCELERATORS, "gpu", lambda: False)
    monkeypatch.chdir(folder)
    assert message in refusal(["fit", "--config", "config.yaml", *options], monkeypatch, capsys)
    assert not Path("runs").exists()


def test_null_in_a_file_is_named_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    plain: dict[str, Any] = yaml.safe_load(Path("config.yaml").read_text())
    plain["model"]["init_args"]["source"] = None
    Path("null.yaml").write_text(yaml.safe_dump(plain))
    message = "null.yaml: expected settings of model.init_args.source, found null"
    assert message in refusal(["fit", "--config", "null.yaml"], monkeypatch, capsys)


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["evaluate", "--output", "out"]], ids=lambda c: c[0]
)
def test_devices_that_are_not_there(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "for --device mps, found none" in refusal([*command, "--device", "mps"], monkeypatch, capsys)
