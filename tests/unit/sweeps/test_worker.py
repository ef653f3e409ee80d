"""Trials are trainings of `fit`, whatever becomes of them: a result, an error, a stop."""

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ptp_lightning.data.corpus import Corpus, Document, Split
from ptp_lightning.sweeps.attributes import (
    ACCURACY,
    COMMAND,
    GIVEN_UP,
    LOG_DIR,
    METRICS,
    PREFIX_COUNTS,
    STEPS,
    TOKENS,
    TRACEBACK,
)
from ptp_lightning.sweeps.queue import Progress
from ptp_lightning.sweeps.training_run import RaisingParser, SharedCorpus
from ptp_lightning.sweeps.worker import Worker
from ptp_lightning.training.cli import TrainingCLI, parsed
from tests.helpers.tiny_study import ENTROPY, METRIC, UNSOUND, worker_for
from tests.helpers.tiny_study import STEPS as BUDGET_STEPS
from tests.helpers.tiny_study import TOKENS as BUDGET_TOKENS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """Both points of the tiny study."""
    worker = worker_for(tmp_path_factory.mktemp("study"), [])
    handler = signal.getsignal(signal.SIGINT)
    assert worker.work(None) == 2
    assert signal.getsignal(signal.SIGINT) is handler  # an interrupted trainer ignores Ctrl-C
    return worker


def test_a_trial_is_what_fit_does(trained: Worker, tmp_path: Path) -> None:
    trial = trained.queue.stored.trials[1]
    assert trial.params == {"objective": "independent"}
    _, _, _, command, *arguments = shlex.split(trial.user_attrs[COMMAND])
    assert command == "fit"
    cli = parsed(TrainingCLI, RaisingParser, [*arguments, f"--trainer.logger.init_args.save_dir={tmp_path}"], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert trial.value == float(cli.trainer.callback_metrics[METRIC])
    assert trial.user_attrs[METRICS] == {tag: float(value) for tag, value in cli.trainer.callback_metrics.items()}


def test_a_trial_has_its_budget_and_its_curves(trained: Worker) -> None:
    first, second = trained.queue.stored.trials
    assert first.user_attrs[METRICS] != second.user_attrs[METRICS]
    for trial in (first, second):
        assert list(trial.intermediate_values) == [BUDGET_STEPS // 2, BUDGET_STEPS]
        assert trial.intermediate_values[BUDGET_STEPS] == trial.value
        assert (trial.user_attrs[STEPS], trial.user_attrs[TOKENS]) == (BUDGET_STEPS, BUDGET_TOKENS)
        counts = trial.user_attrs[PREFIX_COUNTS]
        assert trial.value == pytest.approx(sum(n * windows for n, windows in enumerate(counts)) / sum(counts))
        assert len(trial.user_attrs[ACCURACY]) == 4
        assert trial.user_attrs[ACCURACY][0] == 1.0  # the first token is exact


def test_a_trial_prints_its_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = worker_for(tmp_path, [])
    assert worker.work(1) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trial 0: ")]
    assert 0 < len(lines) <= 4
    assert lines[-1].startswith(f"trial 0: step {BUDGET_STEPS}/{BUDGET_STEPS} (100%), loss ")


def test_tensorboard_has_a_run_a_trial_with_parameters_and_results(trained: Worker) -> None:
    names = [path.name for path in sorted(trained.tensorboard.iterdir())]
    assert names == ["0000_objective=categorical_seed=0", "0001_objective=independent_seed=0"]
    for trial in trained.queue.stored.trials:
        events = EventAccumulator(trial.user_attrs[LOG_DIR]).Reload()
        assert events.Scalars(METRIC)[-1].step == BUDGET_STEPS
        assert events.Scalars(METRIC)[-1].value == pytest.approx(trial.value)
        session, experiment = (
            HParamsPluginData.FromString(events.PluginTagToContent("hparams")[f"_hparams_/{tag}"])
            for tag in ("session_start_info", "experiment")
        )
        shown = session.session_start_info.hparams
        assert shown["objective"].string_value == trial.params["objective"]
        assert shown["seed"].number_value == 0
        assert METRIC in {info.name.tag for info in experiment.experiment.metric_infos}
        assert not list(Path(trial.user_attrs[LOG_DIR]).rglob("*.ckpt"))


def test_a_trial_that_fails_says_why_and_the_next_one_is_trained(tmp_path: Path) -> None:
    messages: list[str] = []
    worker = worker_for(tmp_path, messages, variants={"loss": {"unsound": UNSOUND, "usual": {}}})
    assert worker.work(None) == 2
    failed, complete = worker.queue.stored.trials
    assert (failed.state, complete.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert "in require_sound" in failed.user_attrs[TRACEBACK]
    assert "BinaryCrossEntropy" in failed.user_attrs[TRACEBACK].splitlines()[-1]
    assert messages[1].startswith("trial 0 failed: loss=unsound seed=0: ValueError: ")
    assert worker.queue.progress() == Progress(total=2, complete=1, pruned=0, failed=1, running=0)


def test_a_pruned_trial_stops_at_a_validation(tmp_path: Path) -> None:
    pruner = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 100.0}}
    worker = worker_for(tmp_path, [], pruner=pruner, variants={"one": {"only": {}}})
    worker.work(None)
    (trial,) = worker.queue.stored.trials
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [BUDGET_STEPS // 2]
    assert trial.user_attrs[STEPS] == BUDGET_STEPS // 2


def test_the_last_validation_prunes_nothing(tmp_path: Path) -> None:
    warmup = {"lower": 100.0, "n_warmup_steps": BUDGET_STEPS}
    pruner = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": warmup}
    worker = worker_for(tmp_path, [], pruner=pruner, variants={"one": {"only": {}}})
    worker.work(None)
    assert worker.queue.stored.trials[0].state == TrialState.COMPLETE


def test_a_metric_that_is_not_logged_is_a_failure_that_names_others(tmp_path: Path) -> None:
    worker = worker_for(tmp_path, [], objective={"metric": "val/corect"}, variants={"one": {"only": {}}})
    worker.work(None)
    reason = worker.queue.stored.trials[0].user_attrs[TRACEBACK].splitlines()[-1]
    assert "objective.metric val/corect, found [" in reason
    assert METRIC in reason


def test_a_stopped_trial_is_enqueued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning answers Ctrl-C with an exit."""
    worker = worker_for(tmp_path, [])

    def stop(*_: object) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(worker.runs, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        worker.work(None)
    stopped, *waiting = worker.queue.stored.trials
    assert (stopped.state, stopped.user_attrs[GIVEN_UP]) == (TrialState.FAIL, "stopped")
    assert [trial.state for trial in waiting] == [TrialState.WAITING, TrialState.WAITING]
    assert worker.queue.progress() == Progress(total=2, complete=0, pruned=0, failed=0, running=0)


def test_a_trial_that_another_process_took_for_dead_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    worker = worker_for(tmp_path, messages, variants={"one": {"only": {}}})

    def sleep_too_long(*_: object) -> None:
        worker.queue.stored.tell(0, state=TrialState.FAIL)
        raise RuntimeError("awake")

    monkeypatch.setattr(worker.runs, "run", sleep_too_long)
    assert worker.work(1) == 1
    assert "given up by another process" in messages[-1]


def test_no_more_trials_than_asked_for(tmp_path: Path) -> None:
    worker = worker_for(tmp_path, [])
    assert worker.work(1) == 1
    assert [trial.state.name for trial in worker.queue.stored.trials] == ["COMPLETE", "WAITING"]


def test_the_parameters_outrank_the_command_line(tmp_path: Path) -> None:
    choices = {"class_path": "optuna.distributions.CategoricalDistribution", "init_args": {"choices": [0.5]}}
    worker = worker_for(tmp_path, [], variants={}, settings={ENTROPY: choices})
    worker.overrides = {ENTROPY: "1.25", "data.init_args.seed": "7", "data.init_args.eval_rows": "8"}
    arguments = worker.arguments({ENTROPY: 0.5}, seed=3)
    last = {path: value for path, _, value in (argument.removeprefix("--").partition("=") for argument in arguments)}
    assert (last[ENTROPY], last["data.init_args.seed"], last["data.init_args.eval_rows"]) == ("0.5", "3", "8")
    assert last["trainer.max_steps"] == str(BUDGET_STEPS)


class CountedCorpus(Corpus):
    """Counts how often it is read."""

    def __init__(self) -> None:
        self.times_read = 0

    def documents(self, split: Split) -> Iterator[Document]:
        self.times_read += 1
        yield Document("a", split)


def test_a_shared_corpus_is_read_once_a_split() -> None:
    corpus = CountedCorpus()
    shared = SharedCorpus(corpus)
    for _ in range(3):
        assert [document.text for document in shared.documents("train")] == ["train"]
        assert [document.text for document in shared.documents("val")] == ["val"]
    assert corpus.times_read == 2
