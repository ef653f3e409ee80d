"""Studies with several numbers of steps: their points, their order, and that numbers can be added."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from ptp_lightning.sweeps.budget import STEPS_KEY, Budget
from ptp_lightning.sweeps.definition import definition_of, require_same
from ptp_lightning.sweeps.queue import TrialQueue
from ptp_lightning.sweeps.run import open_study
from ptp_lightning.sweeps.storage import open_storage
from ptp_lightning.sweeps.study import Point, Study
from ptp_lightning.sweeps.worker import suggest, trial_arguments
from tests.helpers.tiny_study import letters


def at_steps(*steps: int, tokens_per_step: int = 3, seeds: tuple[int, ...] = (0, 1)) -> Study:
    return letters(budget=Budget(list(steps), max(steps) * tokens_per_step, validations=1), seeds=seeds)


def queue_of(study: Study, folder: Path) -> TrialQueue:
    storage = open_storage(str(folder / "study.journal"), create=True)
    queue = TrialQueue(study, open_study(study, "letters", storage), storage)
    queue.fill()
    return queue


def take_all(queue: TrialQueue, limit: int = 100) -> list[tuple[int, str, int]]:
    """Give waiting trials a result; returns steps, letter and seed of each."""
    taken = []
    while len(taken) < limit and (trial := queue.take()):
        chosen = {name: suggest(trial, name, one) for name, one in queue.study.distributions.items()}
        taken.append((chosen[STEPS_KEY], chosen["x"], trial.user_attrs["seed"]))
        queue.stored.tell(trial, 1.0)
    return taken


def test_the_points_of_few_steps_of_all_seeds_come_first() -> None:
    assert at_steps(8, 2).points() == [
        Point({"x": letter, STEPS_KEY: steps}, seed) for steps in (2, 8) for seed in (0, 1) for letter in "ab"
    ]


def test_the_number_of_steps_is_an_argument_of_fit() -> None:
    arguments = trial_arguments(at_steps(2, 8), "x.yaml", {STEPS_KEY: 5}, {"x": "a", STEPS_KEY: 2}, seed=0)
    assert [one for one in arguments if STEPS_KEY in one or "val_check" in one] == [
        f"--{STEPS_KEY}=5",
        f"--{STEPS_KEY}=2",
        "--trainer.val_check_interval=2",
    ]


def test_numbers_of_steps_can_be_added_and_left_out_but_tokens_per_step_stay(tmp_path: Path) -> None:
    queue = queue_of(at_steps(2, 8, seeds=(0,)), tmp_path)
    require_same(queue.stored, definition_of(queue.study, {}))
    assert take_all(queue) == [(2, "a", 0), (2, "b", 0), (8, "a", 0), (8, "b", 0)]
    more = queue_of(at_steps(1, 8, 32, seeds=(0,)), tmp_path)
    require_same(more.stored, definition_of(more.study, {}))
    assert take_all(more) == [(1, "a", 0), (1, "b", 0), (32, "a", 0), (32, "b", 0)]
    other = at_steps(2, 8, tokens_per_step=4)
    with pytest.raises(ValueError, match="budget.tokens_per_step: was 3, is 4"):
        require_same(more.stored, definition_of(other, {}))


def test_a_stopped_short_training_goes_on_before_longer_ones(tmp_path: Path) -> None:
    queue = queue_of(at_steps(2, 8, seeds=(0,)), tmp_path)
    trial = queue.take()
    assert trial is not None
    queue.give_up(trial, "stopped")
    queue.fill()
    assert queue.stored.trials[-1].state == TrialState.WAITING  # with the largest number
    assert take_all(queue, limit=3) == [(2, "a", 0), (2, "b", 0), (8, "a", 0)]
