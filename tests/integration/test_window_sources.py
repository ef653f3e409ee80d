"""Sources of windows and strategies of auxiliaries are chosen in YAML: each combination takes a step."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptp_lightning.cli import main
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

GATED_LORA = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"

TEACHER = {"class_path": "ptp_lightning.training.TeacherWindows"}
STUDENT = {"class_path": "ptp_lightning.training.StudentWindows"}
DATASET = {"class_path": "ptp_lightning.training.DatasetWindows"}
BETA = {"class_path": "ptp_lightning.auxiliary_strategies.BetaInInterval", "init_args": {"b": 0.5}}
SEEKING = {"class_path": "ptp_lightning.auxiliary_strategies.ErrorSeekingInInterval", "init_args": {"strength": 0.7}}

SOURCES: dict[str, dict[str, Any]] = {
    "student": STUDENT,
    "teacher, error-seeking": TEACHER | {"init_args": {"strategy": SEEKING}},
    "dataset, Beta": DATASET | {"init_args": {"strategy": BETA}},
    "mixture": {
        "class_path": "ptp_lightning.training.MixtureWindows",
        "init_args": {
            "sources": [TEACHER, STUDENT, DATASET | {"init_args": {"strategy": SEEKING}}],
            "initial_weights": [1.0, 0.0, 1.0],
            "final_weights": [0.0, 1.0, 0.0],
            "schedule_start": 0.25,
            "schedule_end": 0.75,
        },
    },
}


def run(source: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> None:
    corpus = folder / "corpus.txt"
    corpus.write_text(CORPUS_LINE * 400)
    path = shrink(GATED_LORA, corpus, folder)
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"] |= {"source": source} | arguments
    config["trainer"]["fast_dev_run"] = 2
    path.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", str(path)])
    main()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_takes_two_steps(source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path, monkeypatch)


def test_several_drafts_are_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(TEACHER, tmp_path, monkeypatch, num_drafts=3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DATASET | {"init_args": {"strategy": BETA | {"init_args": {"b": 0}}}}, "strategy.init_args.b"),
        (
            SOURCES["mixture"] | {"init_args": {"sources": [TEACHER], "initial_weights": [1, 2]}},
            "source.init_args.initial_weights",
        ),
    ],
)
def test_mistakes_are_named(
    source: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(source, tmp_path, monkeypatch)
    assert message in capsys.readouterr().err
