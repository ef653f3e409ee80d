"""Studies in a PostgreSQL database on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import optuna
import pytest
from optuna.trial import TrialState

from ptp_lightning.sweeps.definition import require_same
from ptp_lightning.sweeps.queue import TrialQueue
from ptp_lightning.sweeps.run import open_study
from ptp_lightning.sweeps.storage import open_storage
from tests.helpers.postgres import PASSWORD, Postgres, find_programs, running_postgres
from tests.helpers.tiny_study import letters

pytest.importorskip("psycopg", reason="needs pip install 'ptp_lightning[postgresql]'")
PROGRAMS = find_programs()
pytestmark = pytest.mark.skipif(PROGRAMS is None, reason="needs a PostgreSQL server: apt-get install postgresql")
NUM_WORKERS = 3
DEFINITION = {"space": {"x": ["a", "b"]}}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    assert PROGRAMS is not None
    with running_postgres(PROGRAMS) as server:
        yield server


def start_worker(location: str) -> TrialQueue:
    """What every process of `sweep run` does before its first trial."""
    study = letters()
    storage = open_storage(location, create=True)
    stored = open_study(study, "letters", storage)
    require_same(stored, DEFINITION)
    queue = TrialQueue(study, stored, storage)
    queue.fill()
    return queue


def test_workers_that_start_together_on_an_empty_database(postgres: Postgres) -> None:
    """Each point is trained once."""
    for _ in range(2):
        location, taken, errors = postgres.empty_database(), [], []
        together = threading.Barrier(NUM_WORKERS)

        def work(location=location, taken=taken, errors=errors, together=together) -> None:
            try:
                together.wait()
                queue = start_worker(location)
                while (trial := queue.take()) is not None:
                    taken.append(trial.suggest_categorical("x", ["a", "b"]))
                    queue.stored.tell(trial, 1.0)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work) for _ in range(NUM_WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert errors == []
        assert sorted(taken) == ["a", "b"]


def test_another_process_continues(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the password from the environment."""
    location = postgres.empty_database()
    first = start_worker(location)
    trial = first.take()
    assert trial is not None
    trial.suggest_categorical("x", ["a", "b"])
    first.stored.tell(trial, 0.5)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    second = start_worker(location.replace(f":{PASSWORD}@", "@").replace("postgresql://", "postgresql+psycopg://"))
    assert (second.progress().complete, second.progress().total) == (1, 2)
    assert optuna.get_all_study_names(open_storage(location, create=False)) == ["letters"]
    states = [one.state for one in second.stored.get_trials(deepcopy=False)]
    assert states.count(TrialState.COMPLETE) == 1


def test_another_definition_is_refused_even_if_both_start_at_once(postgres: Postgres) -> None:
    location = postgres.empty_database()
    queues = [start_worker(location) for _ in range(2)]
    with pytest.raises(ValueError, match=r"space\.x: was"):
        require_same(queues[1].stored, {"space": {"x": ["a", "c"]}})


@pytest.mark.parametrize("wrong", ["password", "database", "port"])
def test_passwords_are_never_shown(wrong: str, postgres: Postgres) -> None:
    address = {
        "password": postgres.address("postgres", password="Wrong-word_7"),
        "database": postgres.address("nowhere"),
        "port": postgres.address("postgres").replace(f":{postgres.port}/", ":9/"),
    }[wrong]
    with pytest.raises(ValueError, match=r"--storage postgresql\+psycopg://tester:\*\*\*@127\.0\.0\.1:") as error:
        open_storage(address, create=True)
    message = str(error.value)
    assert "\n" not in message
    assert PASSWORD not in message and "Wrong-word_7" not in message
    assert error.value.__cause__ is None  # whose traceback would show it
