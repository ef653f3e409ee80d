"""The command line as a newcomer meets it: help, typing errors, and bad input give plain words and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import lightning  # noqa: F401  its log handlers keep the stream of the first import, which must outlive a test
import pytest
import yaml

from ptp_lightning.cli import main

ROOT = Path(__file__).parents[2]
GATED_LORA = str(ROOT / "configs" / "gated_lora.yaml")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; returns the exit status."""
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "pregenerate", "generate", "export"):
        assert f"\n  {command} " in text


@pytest.mark.parametrize("command", ["fit", "pregenerate", "generate", "export"])
def test_every_command_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, command, "--help") == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fly"], ["fly", "fit"]),
        (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["fit", "--config", GATED_LORA, "--trainer.max_stepss", "3"], ["max_stepss"]),
        (["fit", "--config", GATED_LORA, "--model.init_args.predictor.lora.rnk", "3"], ["predictor.lora.rnk"]),
        (["fit", "--config", GATED_LORA, "--model.init_args.predictor.lora.rank", "0"], ["predictor.lora.rank", "0"]),
        (
            ["fit", "--config", GATED_LORA, "--model.init_args.predictor.backbone.path", "./nowhere"],
            ["nowhere", "predictor.backbone.path"],
        ),
        (
            [
                *("fit", "--config", GATED_LORA, "--model.init_args.source", "ptp_lightning.training.DatasetWindows"),
                *("--data.init_args.row_length", "8", "--data.init_args.num_windows", "4"),
            ],
            ["window_length", "data.row_length", "16", "8"],
        ),
        (
            ["fit", "--config", GATED_LORA, "--data.init_args.num_windows", "100000"],
            ["data.num_windows", "data.row_length", "100000"],
        ),
        (
            ["fit", "--config", GATED_LORA, "--model.init_args.loss", "ptp_lightning.losses.KullbackLeibler"],
            ["KullbackLeibler", "one_hot"],
        ),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) and len(value) > 1 else None,
)
def test_mistakes_are_named(
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "Union subtypes" not in message
    for part in expected:
        assert part in message
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_empty_corpus_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    corpus = (
        '{"class_path": "ptp_lightning.data.TextFiles", "init_args": {"paths": ["empty.txt"], "held_out": "lines"}}'
    )
    assert run_main(monkeypatch, "fit", "--config", GATED_LORA, "--data.init_args.corpus", corpus) == 2
    assert "data.corpus" in capsys.readouterr().err


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    """The README's first command, three steps of it, in a process and folder of its own."""
    readme = (ROOT / "README.md").read_text()
    command = "python -m ptp_lightning fit --config configs/gated_lora.yaml"
    assert f"pip install -e . && {command}\n" in readme
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = "--trainer.max_steps 3 --trainer.val_check_interval 3 --data.init_args.eval_rows 4"
    short += " --data.init_args.batch_size 2"
    result = subprocess.run(
        [sys.executable, *command.split()[1:], *short.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "runs" / "gated_lora" / "version_0" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_file()
    assert "correct tokens of a window" in result.stdout
    settings = yaml.safe_load((checkpoint.parents[1] / "hparams.yaml").read_text())
    assert settings["model"] == "DistillationModule"
    assert settings["max_steps"] == 3 and settings["data.batch_size"] == 2
    assert "step 3/3 (100%), loss " in result.stderr  # no terminal
    assert "\u2501" not in result.stdout + result.stderr  # no frame of the progress bar
    assert "for seamless" not in (result.stdout + result.stderr).lower()  # Lightning advertises products
    assert "Warning" not in result.stderr
    assert "python -m ptp_lightning generate --ckpt_path" in result.stdout


def test_a_series_needs_a_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "nyc_teacher.yaml")
    path = "--data.init_args.series.init_args.path"
    assert run_main(monkeypatch, "fit", "--config", config) == 2
    assert f"found no path: set data.series.path (on the command line {path} FILE)" in capsys.readouterr().err
    assert run_main(monkeypatch, "fit", "--config", config, path, "nowhere.csv") == 2
    assert "at nowhere.csv, found none: set data.series.path" in capsys.readouterr().err
