"""What is refused before anything is trained, and the study's command line."""

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from ptp_lightning.cli import main
from ptp_lightning.sweeps import run as running
from ptp_lightning.sweeps.command import split_overrides
from ptp_lightning.sweeps.storage import load_stored, open_storage
from tests.helpers.tiny_study import ENTROPY, UNSOUND, letters, write_study


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "sweep", *arguments])
    main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def choices(*values: object) -> dict[str, Any]:
    return {"class_path": "optuna.distributions.CategoricalDistribution", "init_args": {"choices": list(values)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"model.init_args.predictor.lora.rnk": choices(1, 2)}}, "predictor.lora.rnk"),
        ({"settings": {"trainer.presision": choices("32-true")}}, "trainer.presision"),
        ({"variants": {"size": {"small": {}, "odd": {"data.init_args.eval_rows": "many"}}}}, "eval_rows"),
        ({"overrides": {"data.init_args.bach_size": 1}}, "bach_size"),
        ({"variants": {"size": {"one": {}, "two": {"data.init_args.batch_size": 8}}}}, "4 and 256 for {'size': 'two'}"),
        ({"variants": {"s": {"usual": {}, "short": {"trainer.max_steps": 2}}}}, "found 2 and 64 for {'s': 'short'}"),
        ({"base": "none.yaml"}, "the configuration of a run at none.yaml"),
        ({"variants": {}}, "expected parameters to compare, found none"),
    ],
    ids=str,
)
def test_refused_before_anything_is_stored(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_study(tmp_path, **changes)
    assert message in refused(monkeypatch, capsys, "run", path.name, "--full")
    assert not (tmp_path / "runs").exists()


def test_a_study_goes_on_only_as_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    run = ("run", path.name, "--full", "--trials", "1")
    command(monkeypatch, *run)
    printed = capsys.readouterr().out
    assert "2 trainings of 4 steps and 128 tokens; 0 done" in printed
    assert "| categorical |" in printed
    assert "Report  runs/sweeps/tiny/report.md" in printed
    message = refused(monkeypatch, capsys, *run, f"--{ENTROPY}", "0.5")
    assert f"base.{ENTROPY}: was 1.0, is 0.5" in message
    command(monkeypatch, *run)
    command(monkeypatch, *run)  # nothing is left
    stored = load_stored("tiny", open_storage("runs/sweeps/tiny/study.journal", create=False))
    assert [trial.state for trial in stored.trials] == [TrialState.COMPLETE] * 2
    (tmp_path / "runs/sweeps/tiny/report.md").unlink()
    command(
        monkeypatch,
        "report",
        path.name,
        "--full",
        "--output",
        "elsewhere",
        "--storage",
        running.journal_in("runs/sweeps/tiny"),
    )
    assert "| independent |" in (tmp_path / "elsewhere" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tiny.yaml", "--trials", "0"], "expected --trials >= 1, found 0"),
        (["run", "tiny.yaml", "--jobs", "0"], "expected --jobs >= 1, found 0"),
        (["run", "tiny.yaml", "--quick"], "--quick"),
        (["run"], "study"),
        (
            ["run", "none.yaml"],
            "expected a study at none.yaml, found none: give a file, or one of as_in_the_paper, aux",
        ),
        (["run", "tiny.yaml", "--storage", "."], "an Optuna journal that can be read and written at --storage"),
        (["run", "tiny.yaml", "--model.init_args.seed"], "a value after --model.init_args.seed"),
        (["report", "tiny.yaml"], "start one with run"),
        (["reprot", "tiny.yaml"], "expected run, status or report, found 'reprot'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_command_lines(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_study(tmp_path)
    assert message in refused(monkeypatch, capsys, *arguments)


def test_failed_trials_are_reported_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, variants={"loss": {"usual": {}, "unsound": UNSOUND}})
    message = refused(monkeypatch, capsys, "run", path.name, "--full")
    assert "expected all trials to succeed, found 1 failed: --retry_failed" in message
    assert "| unsound | - | - | 0 | 0 | 1 |" in (tmp_path / "runs/sweeps/tiny/report.md").read_text()


def test_a_missing_file_of_the_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes are built once before the first trial."""
    series = {
        "data.init_args.series": "ptp_lightning.data.PickUps",
        "model.init_args.val_source": "ptp_lightning.training.TeacherWindows",
        "model.init_args.source": "ptp_lightning.training.TeacherWindows",
    }
    path = write_study(tmp_path, overrides=series | {"data.init_args.batch_size": 4, "data.init_args.num_windows": 2})
    message = refused(monkeypatch, capsys, "run", path.name)
    assert "expected a CSV file with latitudes and longitudes, found no path" in message
    stored = load_stored("tiny_quick", open_storage("runs/sweeps/tiny_quick/study.journal", create=False))
    assert stored.trials == []


def test_a_metric_that_is_not_logged_is_refused_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, objective={"metric": "val/corect"})
    message = refused(monkeypatch, capsys, "run", path.name)
    assert "expected a validation that logs objective.metric val/corect, found ['val/" in message
    assert "'val/correct_tokens'" in message
    stored = load_stored("tiny_quick", open_storage("runs/sweeps/tiny_quick/study.journal", create=False))
    assert stored.trials == []


@pytest.mark.parametrize(
    ("is_job", "num_trained", "is_seeds_own"), [(False, 0, True), (True, 0, False), (False, 1, False)]
)
def test_a_samplers_seed_decides_in_the_process_that_begins_the_study(
    is_job: bool, num_trained: int, is_seeds_own: bool
) -> None:
    space = {"lr": FloatDistribution(0.0, 1.0)}
    study = letters(settings=space, sampler=RandomSampler(seed=0), trials=2)
    stored = optuna.create_study(sampler=study.sampler)
    for _ in range(num_trained):
        stored.tell(stored.ask(), 1.0)
    stored.enqueue_trial({})
    running.reseed_unless_first(study, stored, is_job=is_job)
    drawn = stored.ask(space).params
    assert (drawn == optuna.create_study(sampler=RandomSampler(seed=0)).ask(space).params) == is_seeds_own


def test_overrides_are_separated_from_options() -> None:
    arguments = ["run.yaml", "--full", "--model.a", "1", "--data.b=x=y", "--trials", "3", "--trainer.c", "[1, 2]"]
    assert split_overrides(arguments) == (
        ["run.yaml", "--full", "--trials", "3"],
        {"model.a": "1", "data.b": "x=y", "trainer.c": "[1, 2]"},
    )


@pytest.mark.parametrize("option", ["--trainer.max_steps=6", "--trainer.val_check_interval=2"])
def test_the_budget_is_not_an_option(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(monkeypatch, capsys, "run", "losses", option)
    assert f"expected no {option.partition('=')[0]}" in message and "in its file" in message


def test_help_loads_nothing_heavy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "--help")
    assert "The quick version of a study runs" in capsys.readouterr().out
