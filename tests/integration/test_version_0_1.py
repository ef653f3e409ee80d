"""Files of version 0.1 are read: what it stored gives the same texts, and its trainings and studies continue.

`tests/fixtures/version_0_1` was written by commit 86e9a71 with the commands `fit` (four steps of `old_run.yaml`),
`export --with_base_model` (of the checkpoint of step 2), `pregenerate`, and one trial of `old_study.yaml`;
`expected.json` holds the texts of that checkpoint and the state of the training after step 4.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from optuna.trial import TrialState
from transformers import AutoModelForCausalLM

from ptp_lightning import ParallelTokenPredictor, SamplingConfig
from ptp_lightning.cli import main
from ptp_lightning.data.completions.completions import CompletionFolder, RaggedIds
from ptp_lightning.export.migrations import FORMAT_VERSION, migrated_state
from ptp_lightning.sweeps.storage import load_stored, open_storage
from ptp_lightning.training import DistillationModule
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.utils.renamed_keys import with_current_names

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
STEPS = 4
REFINEMENT_STEPS = "model.init_args.predictor.correction.init_args.num_refinement_steps"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, in which paths are relative; `run.yaml` is the configuration with today's names."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    config = with_current_names(yaml.safe_load((tmp_path / "old_run.yaml").read_text()))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", *arguments])
    main()


@pytest.mark.parametrize("stored", ["step_2.ckpt", "model/predictor", "model"])
def test_the_same_texts_with_the_same_calls(stored: str) -> None:
    predictor = ParallelTokenPredictor.from_pretrained(stored)
    for case, expected in EXPECTED["texts"].items():
        decoder, temperature, seed = case.split()
        sampling = SamplingConfig(temperature=float(temperature), top_k=8, top_p=0.9, order="embedding")
        text: Any = predictor.generate(
            [1, 2, 3, 4], max_new_tokens=24, end_of_text=[], seed=int(seed), decoder=decoder, sampling=sampling
        )
        assert {"token_ids": text.token_ids, "num_calls": text.num_calls} == expected, case


def test_transformers_opens_the_folder_with_the_base_model() -> None:
    """With and without its `custom_generate`."""
    prompt = torch.tensor([[1, 2, 3, 4]])
    plain, custom = (
        AutoModelForCausalLM.from_pretrained("model", trust_remote_code=trusted) for trusted in (False, True)
    )
    texts = [model.generate(prompt, do_sample=False, max_new_tokens=24).tolist() for model in (plain, custom)]
    assert texts[0] == texts[1]
    assert isinstance(custom.generate, partial) and not isinstance(plain.generate, partial)


def test_an_export_of_an_old_checkpoint_is_of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "export", "--ckpt_path", "step_2.ckpt", "--output", "new")
    about = json.loads(Path("new/predictor.json").read_text())
    assert about["format_version"] == FORMAT_VERSION == 3
    assert "refiner" not in about["config"]
    assert about["config"]["correction"]["class_path"] == "ptp_lightning.models.DecoderRefiner"
    assert about["config"]["correction"]["init_args"]["num_refinement_steps"] == 2
    assert "rounds" not in about["config"]["correction"]["init_args"]


def test_a_training_continues(folder: Path) -> None:
    """With the optimiser's state: the last two steps are those of the uninterrupted training."""
    cli = parsed(TrainingCLI, PlainErrorParser, ["--config", "run.yaml"], run=False, save_config_callback=None)
    assert isinstance(cli.model, DistillationModule)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path="step_2.ckpt")
    assert cli.trainer.global_step == STEPS
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    expected = EXPECTED["resumed"]
    assert {name: metrics[name] for name in expected["metrics"]} == pytest.approx(expected["metrics"], rel=1e-5)
    state = cli.model.predictor.trainable_state()
    squares = {name: float(value.double().square().sum()) for name, value in state.items() if value.is_floating_point()}
    assert squares == pytest.approx(migrated_state(expected["sums_of_squares"]), rel=1e-5)
    written = torch.load("checkpoints/step=4.ckpt", weights_only=True)
    assert written["predictor"]["format_version"] == FORMAT_VERSION


def test_a_checkpoint_is_validated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(monkeypatch, "validate", "--config", "run.yaml", "--ckpt_path", "step_2.ckpt")
    assert "val/correct_tokens" in capsys.readouterr().out


def test_completions_are_those_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_prompts": 3, "num_completions": 2, "max_new_tokens": 8, "prompt_tokens": 4, "shard_prompts": 2}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command(monkeypatch, "pregenerate", "--config", "run.yaml", "--output", "again", *options)
    old, new = CompletionFolder.open("completions"), CompletionFolder.open("again")
    assert old.settings == new.settings
    for before, after in zip(old.read(), new.read(), strict=True):
        for name in ("values", "offsets") if isinstance(before, RaggedIds) else ("T",):
            assert getattr(before, name).tolist() == getattr(after, name).tolist()


def test_a_study_continues(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The finished point is kept under the new name of its parameter, the waiting one is trained."""
    study = with_current_names(yaml.safe_load(Path("old_study.yaml").read_text()))
    Path("study.yaml").write_text(yaml.safe_dump(study))
    command(monkeypatch, "sweep", "run", "study.yaml", "--full", "--output", "out", "--storage", "study.journal")
    printed = capsys.readouterr().out
    assert "2 trainings of 2 steps and 48 tokens; 1 done" in printed
    rows = [line.split("|")[1:3] for line in printed.splitlines() if line.startswith("| ")]
    assert [name.strip() for name, _ in rows] == ["num_refinement_steps", "---", "1", "2"]
    stored = load_stored("study", open_storage("study.journal", create=False))
    complete = [trial.params for trial in stored.trials if trial.state == TrialState.COMPLETE]
    assert complete == [{"model.init_args.predictor.refiner.rounds": 1}, {REFINEMENT_STEPS: 2}]
