"""`python -m ptp_lightning plan`: the memory of a training step, from its configuration alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptp_lightning import cli
from ptp_lightning.planning.backbones import BACKBONES
from ptp_lightning.planning.command import WIDTH
from tests.helpers.command_output import CommandOutput, Run, run_in_process
from tests.helpers.tiny_configs import CORPUS_LINE, SHRUNKEN, shrink

CONFIGS = Path(__file__).parents[2] / "configs"
TOLERANCE = 0.15
NUM_PARAMETERS = {"1b": 1_100_048_384, "7b": 6_738_415_616, "70b": 68_976_648_192}
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0"}  # see tests.helpers.resident_memory


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Plans for a configuration of the repository with a tiny network."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS_LINE * 400)

    def run(name: str, *args: str) -> CommandOutput:
        config = shrink(CONFIGS / f"{name}.yaml", corpus, tmp_path)
        if name == "tinyllama":  # the teacher would sample token by token
            args = ("--model.init_args.source", "ptp_lightning.training.DatasetWindows", *args)
        if name != "code_teacher":  # which has no windows
            one_layer = ("--model.init_args.predictor.backbone.from_config.num_hidden_layers", "1")
            args = ("--model.init_args.predictor.window_length", "3", *one_layer, *args)
        return run_in_process(monkeypatch, capsys, "plan", "--config", str(config), *args)

    return run


def test_a_row_for_every_part_and_a_total(plan: Run) -> None:
    printed = plan("tinyllama", "--gpus", "2", "--memory", "1GB", "--data.init_args.num_windows", "8")
    assert printed.status == 0
    header, *rows = printed.out.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert header.split() == ["GB", "on", "each", "of", "2", "GPUs", "replicated", "sharded"]
    numbers = {row[:WIDTH].strip(): [float(number) for number in row[WIDTH:].split()] for row in rows}
    assert len(numbers["DDP gradient buckets"]) == len(numbers["all-gathered layers"]) == 1
    assert printed.out.endswith("Fits         replicated yes, sharded yes (in 90% of 1.0 GB)\n")
    assert "8 windows in each" in printed.out


def test_json_adds_up(plan: Run) -> None:
    result: dict[str, Any] = json.loads(plan("tinyllama", "--json", "--trainer.devices", "2").out)
    assert result["gpus"] == 2  # the configuration's own
    for parts in result["bytes"].values():
        assert parts.pop("total") == sum(parts.values())
    assert result["fits"] is None and result["lowered"] == {}


def test_settings_to_lower_are_listed_if_the_step_does_not_fit(plan: Run) -> None:
    result = json.loads(plan("tinyllama", "--json", "--memory", "1MB").out)
    assert result["fits"] == {"replicated": False}
    total = result["bytes"]["replicated"]["total"]
    lowered = {name: entry["replicated"]["total"] for name, entry in result["lowered"].items()}
    assert list(lowered) == [  # no window of 1
        "data.batch_size: 1 instead of 2",
        "data.num_windows: 1 instead of 2",
        "activation_checkpointing: true",
        "predictor.backbone.dtype: bfloat16 instead of float32",
    ]
    assert lowered["data.batch_size: 1 instead of 2"] < total
    assert lowered["activation_checkpointing: true"] < total


# The slow one is a distillation as in the other tests; its slots encode sampling settings.
@pytest.mark.parametrize(
    "name", ["code_teacher", "nyc_teacher_free", pytest.param("code_sampling_range", marks=pytest.mark.slow)]
)
def test_every_kind_of_module_can_be_planned(plan: Run, name: str) -> None:
    assert json.loads(plan(name, "--json").out)["bytes"]["replicated"]["total"] > 0


def test_the_precision_of_the_trainer_counts(plan: Run) -> None:
    plans = [
        json.loads(plan("tinyllama", "--json", "--trainer.precision", name).out) for name in ("32-true", "bf16-true")
    ]
    single, half = [entry["bytes"]["replicated"] for entry in plans]
    assert single["trained parameters"] == 2 * half["trained parameters"]
    saved = "activations saved for the backward pass"
    assert half[saved] < 0.8 * single[saved]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--memory", "much"], "expected --memory such as 80GB, found 'much'"),
        (["--gpus", "0"], "expected --gpus >= 1, found 0"),
        (["--backbone", "2b"], "expected --backbone 1b, 7b, 70b, found '2b'"),
        (["--data.init_args.batch_size", "0"], "expected data.batch_size >= 1, found 0"),
    ],
)
def test_errors_name_the_option(plan: Run, args: list[str], reason: str) -> None:
    printed = plan("tinyllama", *args)
    assert printed.status == 2
    assert reason in printed.err


@pytest.mark.parametrize("name", list(BACKBONES))
def test_backbones_have_their_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**BACKBONES[name]))
    assert model.num_parameters() == NUM_PARAMETERS[name]


def test_a_backbone_replaces_a_hub_id_without_a_download(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKBONES, "7b", SHRUNKEN | {"hidden_size": 48})
    args = [
        "--config",
        str(CONFIGS / "vicuna.yaml"),
        "--backbone",
        "7b",
        "--model.init_args.predictor.window_length",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "plan", *args])
    cli.main()
    total, trained = re.findall(r"(\d[\d,]*) (?:parameters|of them)", capsys.readouterr().out)
    frozen = int(total.replace(",", "")) - int(trained.replace(",", ""))
    assert frozen == 2048 * 48 * 2 + 2 * (4 * 48 * 48 + 3 * 48 * 64 + 2 * 48) + 48


@pytest.mark.slow
@pytest.mark.parametrize("num_windows", [16, 48])
def test_a_plan_is_the_memory_of_a_real_training(num_windows: int) -> None:
    """For the embedded model, compared with the resident memory of a Lightning training."""
    options = ["--config", str(CONFIGS / "gated_lora.yaml"), "--data.init_args.num_windows", str(num_windows)]

    def printed_by(*command: str) -> str:
        ran = [sys.executable, "-m", *command, *options, "--trainer.accelerator", "cpu"]
        return subprocess.run(ran, env=os.environ | EXACT_HEAP, capture_output=True, text=True, check=True).stdout

    expected = json.loads(printed_by("ptp_lightning", "plan", "--json"))["bytes"]["replicated"]["total"]
    found = int(printed_by("tests.helpers.resident_memory").splitlines()[-1])
    assert expected == pytest.approx(found, rel=TOLERANCE)
