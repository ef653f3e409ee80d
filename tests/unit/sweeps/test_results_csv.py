"""Results go through a CSV file unchanged, as far as a report shows them."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from ptp_lightning.sweeps.attributes import COMMAND, GIVEN_UP, TRACEBACK, VERSION
from ptp_lightning.sweeps.command import report
from ptp_lightning.sweeps.figures import CURVES
from ptp_lightning.sweeps.report import report_text, write_report
from ptp_lightning.sweeps.results_csv import read_csv, write_csv
from ptp_lightning.sweeps.summary import rows_of
from tests.helpers.tiny_study import letters
from tests.unit.sweeps.test_crossings import CROSSING, study_of
from tests.unit.sweeps.test_crossings import trained as trained_at_steps
from tests.unit.sweeps.test_report import add, trained


def test_the_report_of_the_file_is_that_of_the_storage(tmp_path: Path) -> None:
    study = letters(seeds=(0, 1, 2), extra_metrics=["val/other"], draft_lengths=[2])
    stored = trained(study)
    add(stored, study, {"x": "a"}, None, state=TrialState.FAIL, **{TRACEBACK: "Traceback\nValueError: no"})
    add(stored, study, {"x": "a"}, None, state=TrialState.FAIL, **{GIVEN_UP: "stopped"})
    add(stored, study, {"x": "b"}, 9.0, state=TrialState.PRUNED)
    add(stored, study, {"x": "b"}, 4.0, seed=3, **{VERSION: "0.2.0+1234567"})
    file = tmp_path / "new" / "results.csv"
    write_csv(study, stored, file)
    assert "0.2.0+1234567" in file.read_text()
    assert "fit --seed" not in file.read_text()  # commands hold paths of the machine
    again = read_csv(study, file, "letters")
    texts = [report_text(study, one, rows_of(study, one)) for one in (stored, again)]
    without_command = texts[0].replace(" Its training alone:\n\n```\nfit --seed 0\n```", "")
    without_failure = without_command.replace(texts[0][texts[0].index("Failed (") :], "")
    assert texts[1].strip() == without_failure.strip()
    assert COMMAND not in again.trials[0].user_attrs
    write_csv(study, again, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == file.read_text()


def test_several_budgets_and_numbers_as_parameters(tmp_path: Path) -> None:
    study = study_of()
    stored = trained_at_steps(study, CROSSING)
    write_csv(study, stored, tmp_path / "results.csv")
    again = read_csv(study, tmp_path / "results.csv", "letters")
    assert (
        write_report(study, again, tmp_path / "b").splitlines()[:20]
        == (write_report(study, stored, tmp_path / "a").splitlines()[:20])
    )
    assert (tmp_path / "b" / CURVES).read_bytes() == (tmp_path / "a" / CURVES).read_bytes()
    rates = letters(settings={"lr": FloatDistribution(0.1, 0.3, step=0.1), "n": CategoricalDistribution([1, None])})
    stored = trained(rates, {})
    add(stored, rates, {"lr": 0.2, "n": None}, 1.0)
    write_csv(rates, stored, tmp_path / "rates.csv")
    (trial,) = read_csv(rates, tmp_path / "rates.csv", "letters").trials
    assert trial.params == {"lr": 0.2, "n": None}


def test_the_rows_are_in_the_order_of_the_study(tmp_path: Path) -> None:
    study = letters(seeds=(0, 1))
    stored = trained(study, {})
    for letter, seed in (("b", 1), ("a", 1), ("b", 0), ("a", 0)):
        add(stored, study, {"x": letter}, 1.0, seed)
    write_csv(study, stored, tmp_path / "results.csv")
    lines = (tmp_path / "results.csv").read_text().splitlines()[1:]
    assert [line[:3] for line in lines] == ["a,0", "b,0", "a,1", "b,1"]


def test_files_of_another_study_are_refused(tmp_path: Path) -> None:
    study, file = letters(), tmp_path / "results.csv"
    with pytest.raises(FileNotFoundError, match="--from_csv"):
        read_csv(study, file, "letters")
    write_csv(study, trained(study), file)
    with pytest.raises(ValueError, match=r"none named \['y'\]"):
        read_csv(letters(settings={"y": CategoricalDistribution(["a", "b"])}), file, "letters")
    with pytest.raises(ValueError, match=r"line 2: expected one of the choices \['c'\] of x, found 'a'"):
        read_csv(letters(settings={"x": CategoricalDistribution(["c"])}), file, "letters")


def test_the_command_needs_no_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of()
    (tmp_path / "letters.yaml").write_text(
        "title: letters\nbase: x.yaml\nbudget: {steps: [10, 100, 1000], tokens: 2000, validations: 1}\n"
        "seeds: [0, 1, 2]\nvariants: {x: {a: {}, b: {}}}\n"
    )
    written, again = tmp_path / "results.csv", tmp_path / "again.csv"
    write_csv(study, trained_at_steps(study, CROSSING), written)
    output = tmp_path / "output"
    arguments = ["--full", "--from_csv", str(written), "--csv", str(again), "--output", str(output)]
    report([str(tmp_path / "letters.yaml"), *arguments])
    assert "x=a leads x=b" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == [CURVES, "positions.png", "report.md"]
    assert again.read_text() == written.read_text()
