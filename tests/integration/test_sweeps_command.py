"""Studies run by several processes, of which some are killed or stopped: nothing is lost and nothing trained twice.

Each test takes many trainings. tests/unit/sweeps/test_queue.py does without trainings what their processes do together.
"""

import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from ptp_lightning.sweeps.attributes import GIVEN_UP, LOST, OWNER, POINT, STEPS
from ptp_lightning.sweeps.storage import load_stored, open_storage
from tests.helpers.forked_process import ForkedProcess, run_command
from tests.helpers.tiny_study import write_study

pytestmark = pytest.mark.slow

JOURNAL = "runs/sweeps/tiny/study.journal"
PATIENCE_SECONDS = 240.0
LONG = {"steps": 80, "tokens": 80 * 4 * 2 * 4, "validations": 1}  # a few seconds


def start(study: Path, *more: str) -> ForkedProcess:
    return ForkedProcess(run_command, "sweep", "run", str(study), "--full", *more, folder=study.parent)


def finish(run: ForkedProcess) -> str:
    output = "".join(run.communicate(timeout=PATIENCE_SECONDS))
    assert run.returncode == 0, output
    return output


def trials(folder: Path) -> list[FrozenTrial]:
    if not (folder / JOURNAL).exists():
        return []
    storage = open_storage(str(folder / JOURNAL), create=False)
    return load_stored("tiny", storage).trials if storage.get_all_studies() else []


def wait_for_one_done_and_one_running(folder: Path, *runs: ForkedProcess) -> FrozenTrial:
    """The trial that runs, of any of the processes; it began after the end of another one, so it does not end soon."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for run in runs:
            assert run.poll() is None, run.communicate()
        found = trials(folder)
        ends = [trial.datetime_complete for trial in found if trial.state == TrialState.COMPLETE]
        for trial in found:
            begin, is_running = trial.datetime_start, trial.state == TrialState.RUNNING and OWNER in trial.user_attrs
            if is_running and any(begin is not None and end is not None and end <= begin for end in ends):
                return trial
        time.sleep(0.1)
    raise AssertionError("no trial came to its end")


def require_each_point_once(folder: Path, num_points: int) -> None:
    """Every point has one result, which nobody else had taken."""
    results = Counter(trial.user_attrs[POINT] for trial in trials(folder) if trial.state == TrialState.COMPLETE)
    assert len(results) == num_points
    assert set(results.values()) == {1}
    others = [trial for trial in trials(folder) if trial.state != TrialState.COMPLETE]
    assert all(GIVEN_UP in trial.user_attrs for trial in others)


def test_two_processes_of_which_one_is_killed_share_a_study(tmp_path: Path) -> None:
    study = write_study(tmp_path, budget=LONG, seeds=[0, 1])
    runs = [start(study), start(study)]
    try:
        running = wait_for_one_done_and_one_running(tmp_path, *runs)
        finished = {trial.number: trial.value for trial in trials(tmp_path) if trial.state == TrialState.COMPLETE}
        killed = next(run for run in runs if run.pid == running.user_attrs[OWNER]["pid"])
        killed.kill()
        (other,) = (run for run in runs if run is not killed)
        killed.communicate()
        output = finish(other)
    finally:
        for run in runs:
            run.kill()
    assert "| independent |" in output
    require_each_point_once(tmp_path, 4)
    after = trials(tmp_path)
    assert LOST in after[running.number].user_attrs
    for number, value in finished.items():
        assert after[number].value == value


def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    study = write_study(tmp_path, budget=LONG, seeds=[0, 1])
    run = start(study)
    try:
        running = wait_for_one_done_and_one_running(tmp_path, run)
    finally:
        run.kill()
        run.communicate()
    before = trials(tmp_path)
    finish(start(study))
    require_each_point_once(tmp_path, 4)
    after = trials(tmp_path)
    assert [trial.value for trial in before if trial.state == TrialState.COMPLETE] == [
        after[trial.number].value for trial in before if trial.state == TrialState.COMPLETE
    ]
    assert LOST in after[running.number].user_attrs


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_a_stopped_study_puts_its_trial_back_and_goes_on(sent: signal.Signals, tmp_path: Path) -> None:
    study = write_study(tmp_path, budget=LONG, seeds=[0, 1])
    run = start(study)
    try:
        wait_for_one_done_and_one_running(tmp_path, run)
        time.sleep(1.0)  # somewhere among its steps
        run.send_signal(sent)
        output = "".join(run.communicate(timeout=PATIENCE_SECONDS))
    finally:
        run.kill()
    assert run.returncode == 128 + sent, output
    assert "stopped and enqueued again" in output
    assert "Stopped. The same command continues." in output
    states = Counter(trial.state.name for trial in trials(tmp_path))
    assert states["RUNNING"] == 0
    assert states["FAIL"] == 1
    finish(start(study))
    require_each_point_once(tmp_path, 4)


def test_jobs_share_a_study(tmp_path: Path) -> None:
    study = write_study(tmp_path, seeds=[0, 1, 2])
    output = finish(start(study, "--jobs", "2", "--trials", "5"))
    assert output.count("| independent |") == 1  # one of them reports
    done = [trial for trial in trials(tmp_path) if trial.state == TrialState.COMPLETE]
    assert len(done) == 5
    assert len({trial.user_attrs[OWNER]["pid"] for trial in done}) == 2


def test_stopped_jobs_put_their_trials_back(tmp_path: Path) -> None:
    study = write_study(tmp_path, budget=LONG, seeds=[0, 1, 2])
    run = start(study, "--jobs", "2")
    try:
        wait_for_one_done_and_one_running(tmp_path, run)
        run.terminate()
        output = "".join(run.communicate(timeout=PATIENCE_SECONDS))
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM, output
    assert not [trial for trial in trials(tmp_path) if trial.state == TrialState.RUNNING]
    finish(start(study))
    require_each_point_once(tmp_path, 6)


def test_ranks_prune_together_and_the_next_trial_has_its_own(tmp_path: Path) -> None:
    pruner = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 100.0}}
    ranks = {"trainer.strategy": "ddp", "trainer.devices": 2, "trainer.accelerator": "cpu"}
    budget = {"steps": 4, "tokens": 2 * 4 * 4 * 2 * 4, "validations": 2}
    overrides = {"trainer.num_sanity_val_steps": 0, "data.init_args.batch_size": 4, "data.init_args.num_windows": 2}
    study = write_study(
        tmp_path, pruner=pruner, budget=budget, overrides=overrides | ranks | {"data.init_args.eval_rows": 16}
    )
    finish(start(study))
    pruned = trials(tmp_path)
    assert [trial.state for trial in pruned] == [TrialState.PRUNED] * 2
    assert [trial.user_attrs[STEPS] for trial in pruned] == [2, 2]


def test_a_study_of_known_truth(tmp_path: Path) -> None:
    """Without auxiliaries the third slot cannot come below the marginal divergence; with them it does."""
    from ptp_lightning.data import MarkovSeries

    least = float(MarkovSeries(order=1, vocab_size=5, entropy=1.0).marginal_divergence(4)[3])
    study = write_study(
        tmp_path,
        overrides={"trainer.num_sanity_val_steps": 0, "data.init_args.eval_rows": 512},
        budget={"steps": 200, "tokens": 200 * 64 * 6 * 4, "validations": 2},
        objective={"metric": "val/kl/position_03", "direction": "minimize"},
    )
    output = finish(start(study))
    categorical, independent = (trial.value for trial in trials(tmp_path))
    assert categorical is not None
    assert independent is not None
    assert independent == pytest.approx(least, abs=0.05)
    assert categorical < least / 2
    assert "Best: objective=categorical." in output
