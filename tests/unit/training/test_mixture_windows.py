"""Mixtures of sources: weights by hand, choices by frequency, and progress during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.training.windows.mixture_windows import MixtureWindows
from ptp_lightning.training.windows.student_windows import StudentWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSource
from tests.helpers.goodness_of_fit import chi_square, chi_square_bound
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import make_module, make_trainer

SOURCES: list[WindowSource] = [TeacherWindows(), StudentWindows(), DatasetWindows()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestWeights:
    def test_move_in_a_straight_line(self) -> None:
        mixture = MixtureWindows(
            SOURCES, initial_weights=[3, 1, 0], final_weights=[0, 2, 2], schedule_start=0.2, schedule_end=0.6
        )
        expected = {
            0.0: [0.75, 0.25, 0],
            0.2: [0.75, 0.25, 0],
            0.3: [0.5625, 0.3125, 0.125],
            0.4: [0.375, 0.375, 0.25],
            0.6: [0, 0.5, 0.5],
            1.0: [0, 0.5, 0.5],
        }
        for progress, weights in expected.items():
            assert mixture.weights(progress) == pytest.approx(weights), progress

    def test_change_at_once(self) -> None:
        mixture = MixtureWindows(
            SOURCES[:2], initial_weights=[1, 0], final_weights=[0, 1], schedule_start=0.5, schedule_end=0.5
        )
        assert [mixture.weights(progress) for progress in (0.0, 0.499, 0.5, 1.0)] == [[1, 0], [1, 0], [0, 1], [0, 1]]

    def test_stay_by_default(self) -> None:
        mixture = MixtureWindows(SOURCES[:2], initial_weights=[1, 3])
        assert all(mixture.weights(progress) == [0.25, 0.75] for progress in (0.0, 0.5, 1.0))

    def test_a_training_shares_its_first_steps_with_longer_ones_if_they_stay(self) -> None:
        constant = MixtureWindows(SOURCES[:2], initial_weights=[1, 3])
        changing = MixtureWindows(SOURCES[:2], initial_weights=[1, 0], final_weights=[0, 1])
        nested = MixtureWindows([changing, SOURCES[0]], initial_weights=[1, 1])
        shared = [make_module(source=one).shared_steps(10) for one in (SOURCES[0], constant, changing, nested)]
        assert shared == [6, 6, 0, 0]  # of 10, the last 4 with a falling rate

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"initial_weights": [1.0]}, "one weight a source in source.init_args.initial_weights, found 1 for 3"),
            (
                {"initial_weights": [1.0, 1.0, 1.0], "final_weights": []},
                "source.init_args.final_weights, found 0 for 3",
            ),
            ({"initial_weights": [0.0, 0.0, 0.0]}, "not all 0, in source.init_args.initial_weights"),
            ({"initial_weights": [1.0, -1.0, 1.0]}, "finite weights >= 0"),
            ({"initial_weights": [1.0, float("nan"), 1.0]}, "finite weights >= 0"),
            (
                {"initial_weights": [1.0, 1.0, 1.0], "schedule_start": 0.5, "schedule_end": 0.4},
                "schedule_start <= source.init_args.schedule_end",
            ),
            ({"initial_weights": [1.0, 1.0, 1.0], "schedule_end": 1.5}, "<= 1, found 0.0 and 1.5"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MixtureWindows(SOURCES, **settings)


def test_a_choice_of_ones_own_counts_as_dependent_on_progress() -> None:
    class Own(TeacherWindows):
        def choose(self, progress: float, generator: torch.Generator) -> WindowSource:
            return self

    assert Own().depends_on_progress
    assert not TeacherWindows().depends_on_progress


class TestChoice:
    @pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
    def test_follows_the_weights(self, progress: float) -> None:
        mixture = MixtureWindows(SOURCES, initial_weights=[3, 1, 1], final_weights=[1, 1, 3])
        state, counts = generator(), torch.zeros(3, dtype=torch.float64)
        for _ in range(5_000):
            counts[SOURCES.index(mixture.choose(progress, state))] += 1
        weights = torch.tensor(mixture.weights(progress), dtype=torch.float64)
        assert chi_square(counts, weights) < chi_square_bound(2)

    def test_is_the_same_for_the_same_generator(self) -> None:
        mixture = MixtureWindows(SOURCES, initial_weights=[1, 1, 1])
        runs = [[mixture.choose(0.5, generator(seed)) for seed in range(50)] for _ in range(2)]
        assert runs[0] == runs[1]
        assert all(source in runs[0] for source in SOURCES)

    def test_reaches_into_mixtures(self) -> None:
        inner = MixtureWindows(SOURCES[:2], initial_weights=[1, 0], final_weights=[0, 1])
        outer = MixtureWindows([inner], initial_weights=[1])
        assert [outer.choose(progress, generator()) for progress in (0.0, 1.0)] == SOURCES[:2]

    def test_other_sources_choose_themselves(self) -> None:
        for source in SOURCES:
            state = generator()
            assert source.choose(0.5, state) is source
            assert torch.equal(state.get_state(), generator().get_state())


def test_reads_rows_if_a_source_does() -> None:
    assert MixtureWindows(SOURCES, initial_weights=[1, 1, 0]).reads_rows
    assert not MixtureWindows(SOURCES[:2], initial_weights=[1, 1]).reads_rows


@dataclass(frozen=True)
class Recorder(TeacherWindows):
    """Notes the progress of every step."""

    def choose(self, progress: float, generator: torch.Generator) -> WindowSource:
        RECORDED.append(progress)
        return self


RECORDED: list[float] = []


def test_progress_is_the_share_of_steps(tmp_path: Path) -> None:
    RECORDED.clear()
    module = make_module(source=Recorder())
    make_trainer(tmp_path, max_steps=4, accumulate_grad_batches=2).fit(module, datamodule=tiny_data())
    assert RECORDED == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


def test_a_mixture_trains(tmp_path: Path) -> None:
    module = make_module(source=MixtureWindows(SOURCES, initial_weights=[1, 0, 1], final_weights=[0, 1, 1]))
    trainer = make_trainer(tmp_path, max_steps=6)
    trainer.fit(module, datamodule=tiny_data())
    assert float(trainer.callback_metrics["train/loss_nats"]) > 0


@dataclass(frozen=True)
class Drawn(TeacherWindows):
    """Notes what the generator of its choice would draw first."""

    def choose(self, progress: float, generator: torch.Generator) -> WindowSource:
        RECORDED.append(float(torch.rand(1, generator=generator)))
        return self


def test_ranks_choose_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or those that share a network would wait for each other in layers that only one of them runs."""
    choices = []
    for rank in range(2):
        RECORDED.clear()
        module = make_module(source=Drawn())
        monkeypatch.setattr(type(module), "global_rank", rank)
        make_trainer(tmp_path, max_steps=3, limit_val_batches=2, val_check_interval=3).fit(
            module, datamodule=tiny_data()
        )
        choices.append(list(RECORDED))
    assert choices[0] == choices[1]
    assert len(set(choices[0])) == 5  # in each of three steps and two validation batches anew
