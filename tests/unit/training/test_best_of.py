"""Several drafts: which choice leaves the text a sample of the teacher, and which does not.

The teacher is a Markov chain over three tokens and a window holds three, so all 27 texts have exact probabilities.
Chi-square statistics are compared with the bound that a true distribution exceeds once in a million draws: an unbiased
rule stays below it, and a biased one goes beyond, in runs of the same size and with fixed seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import draw_auxiliaries, pick
from ptp_lightning.sampling import TokenDistribution
from ptp_lightning.training.modules.best_of import best_of, distance_from_centres, relative_positions
from ptp_lightning.training.modules.distillation import DistillationModule
from ptp_lightning.training.windows.student_windows import StudentWindows
from ptp_lightning.training.windows.window_source import WindowSample
from tests.helpers.goodness_of_fit import chi_square, chi_square_bound
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import make_module, make_trainer

V = L = 3
NUM_CONTEXTS, M = 100_000, 4
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TEACHER = torch.tensor([[0.1, 0.1, 0.8], [0.96, 0.02, 0.02], [0.3, 0.3, 0.4]], dtype=torch.float64)
# What the student believes to come next: nearly correct after a 0, wrong after a 2.
STUDENT = torch.tensor([[0.12, 0.1, 0.78], [0.9, 0.05, 0.05], [0.8, 0.1, 0.1]], dtype=torch.float64)


class Text(NamedTuple):
    """Tokens `[..., L]`, and the relative positions of u in the intervals of the teacher's picks along some text."""

    token_ids: Tensor
    relative: Tensor


class Drafts(NamedTuple):
    auxiliaries: Tensor
    true: Text
    """The teacher's own text."""
    along: Text
    """The teacher's picks along the student's text."""
    num_committed: Tensor
    """`[...]`, correct tokens of the student and the teacher's correction, at most L."""


def rows(table: Tensor, tokens: Tensor | None, like: Tensor) -> TokenDistribution:
    return TokenDistribution(FIRST.expand(*like.shape, V) if tokens is None else table[tokens])


def write(auxiliaries: Tensor, writer: Tensor) -> Text:
    """A text with the transitions of `writer`, read by the teacher."""
    text: list[Tensor] = []
    picks: list[Tensor] = []
    relative: list[Tensor] = []
    for u in auxiliaries.unbind(-1):
        before = text[-1] if text else None
        Q = rows(TEACHER, before, u)
        picks.append(pick(u, Q))
        relative.append(relative_positions(u, Q, picks[-1]))
        text.append(pick(u, rows(writer, before, u)))
    return Text(torch.stack(picks, -1), torch.stack(relative, -1))


def draft(auxiliaries: Tensor) -> Tensor:
    tokens: list[Tensor] = []
    for u in auxiliaries.unbind(-1):
        tokens.append(pick(u, rows(STUDENT, tokens[-1] if tokens else None, u)))
    return torch.stack(tokens, -1)


@pytest.fixture(scope="module")
def drafts() -> Drafts:
    auxiliaries = draw_auxiliaries((NUM_CONTEXTS, M, L), torch.Generator().manual_seed(0), "cpu")
    true, along = write(auxiliaries, TEACHER), write(auxiliaries, STUDENT)
    correct = (draft(auxiliaries) == along.token_ids).long().cumprod(-1).sum(-1)
    return Drafts(auxiliaries, true, along, (correct + 1).clamp_max(L))


def chosen(values: Tensor, choice: Tensor) -> Tensor:
    """`[contexts, M, L]` at the choice `[contexts]`: `[contexts, L]`."""
    return values[torch.arange(len(values)), choice]


def statistic(token_ids: Tensor) -> float:
    """Of texts `[contexts, 3]` against the teacher's probabilities of all 27."""
    probabilities = FIRST[:, None, None] * TEACHER[:, :, None] * TEACHER[None, :, :]
    index = (token_ids * torch.tensor([9, 3, 1])).sum(-1)
    return chi_square(torch.bincount(index, minlength=27).double(), probabilities.flatten())


def continued(drafts: Drafts, choice: Tensor, fresh: bool) -> Tensor:
    """What is committed of the chosen drafts, and the teacher's text after it with fresh or with the same u."""
    token_ids = chosen(drafts.along.token_ids, choice).clone()
    committed = drafts.num_committed[torch.arange(NUM_CONTEXTS), choice]
    auxiliaries = chosen(drafts.auxiliaries, choice)
    if fresh:
        auxiliaries = draw_auxiliaries(auxiliaries.shape, torch.Generator().manual_seed(1), "cpu")
    for position in range(1, L):
        token = pick(auxiliaries[:, position], TokenDistribution(TEACHER[token_ids[:, position - 1]]))
        token_ids[:, position] = torch.where(position < committed, token_ids[:, position], token)
    return token_ids


BOUND = chi_square_bound(26)  # p = 1e-6
BIASED = 2 * BOUND  # p < 1e-18


class TestChoice:
    def test_committed_tokens_are_the_teachers(self, drafts: Drafts) -> None:
        inside = torch.arange(L) < drafts.num_committed.unsqueeze(-1)
        assert torch.equal(drafts.along.token_ids[inside], drafts.true.token_ids[inside])
        lengths = torch.bincount(drafts.num_committed.flatten(), minlength=L + 1)
        assert (lengths[2:] > NUM_CONTEXTS / 10).all() and not lengths[:2].any()

    def test_any_fixed_draft_is_unbiased(self, drafts: Drafts) -> None:
        assert statistic(drafts.true.token_ids[:, 0]) < BOUND

    def test_closest_to_the_centres_is_unbiased(self, drafts: Drafts) -> None:
        choice = distance_from_centres(drafts.true.relative).argmin(-1)
        assert statistic(chosen(drafts.true.token_ids, choice)) < BOUND

    def test_the_longest_is_biased(self, drafts: Drafts) -> None:
        choice = drafts.num_committed.argmax(-1)
        assert statistic(chosen(drafts.true.token_ids, choice)) > BIASED
        assert statistic(continued(drafts, choice, fresh=True)) > BIASED

    def test_as_many_positions_as_the_student_was_correct_are_biased(self, drafts: Drafts) -> None:
        counts = torch.arange(L) < drafts.num_committed.unsqueeze(-1)
        distance = ((drafts.true.relative - 0.5).abs() * counts).sum(-1) / counts.sum(-1)
        assert statistic(chosen(drafts.true.token_ids, distance.argmin(-1))) > BIASED

    def test_centres_along_the_students_text_are_unbiased_with_fresh_auxiliaries(self, drafts: Drafts) -> None:
        """What one verifying call knows."""
        choice = distance_from_centres(drafts.along.relative).argmin(-1)
        assert statistic(continued(drafts, choice, fresh=True)) < BOUND

    def test_and_biased_with_the_rest_of_their_own(self, drafts: Drafts) -> None:
        choice = distance_from_centres(drafts.along.relative).argmin(-1)
        assert statistic(continued(drafts, choice, fresh=False)) > BIASED

    def test_centres_are_more_often_correct(self, drafts: Drafts) -> None:
        """Why one would choose at all. Errors lie at the edges of intervals."""
        choice = distance_from_centres(drafts.along.relative).argmin(-1)
        gain = (drafts.num_committed[torch.arange(NUM_CONTEXTS), choice] - drafts.num_committed[:, 0]).double()
        assert gain.mean() > 5 * gain.std() / NUM_CONTEXTS**0.5


class TestCentres:
    def test_relative_positions_by_hand(self) -> None:
        P = TokenDistribution(torch.tensor([0.5, 0.25, 0.25]).expand(4, -1))
        u = torch.tensor([0.0, 0.25, 0.625, 0.9375], dtype=torch.float64)
        assert relative_positions(u, P, torch.tensor([0, 0, 1, 2])).tolist() == [0.0, 0.5, 0.5, 0.75]

    def test_distance_by_hand(self) -> None:
        relative = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.5, 1.0], [0.75, 0.25, 0.5]], dtype=torch.float64)
        assert distance_from_centres(relative).tolist() == pytest.approx([0, 1 / 3, 1 / 6])


def best_windows(module: DistillationModule, num_drafts: int) -> tuple[Tensor, Tensor]:
    batch = next(iter(tiny_data().train_dataloader()))
    context = module.predictor.encode(batch, end_of_text=0)
    return best_of(num_drafts, module.predictor, context, torch.Generator().manual_seed(0))


def test_best_of_equals_a_loop_over_windows() -> None:
    module = make_module()
    batch = next(iter(tiny_data().train_dataloader()))
    context, generator = module.predictor.encode(batch, end_of_text=0), torch.Generator().manual_seed(0)
    samples: list[WindowSample] = [StudentWindows().sample(module.predictor, context, generator) for _ in range(5)]
    correct, mask = best_windows(module, 5)
    winners: set[int] = set()
    for row, window in [(row, window) for row in range(2) for window in range(3)]:
        distances: list[float] = []
        for sample in samples:
            distance = 0.0
            for position in range(4):
                probabilities = sample.teacher.materialize().probabilities[row, window, position].double()
                assert sample.teacher.materialize().token_ids is not None
                listed = sample.teacher.materialize().token_ids[row, window, position].tolist()
                entry = listed.index(int(sample.token_ids[row, window, position]))
                below = float(probabilities[:entry].sum())
                share = (float(sample.auxiliaries[row, window, position]) - below) / float(probabilities[entry])
                distance += abs(share - 0.5)
            distances.append(distance)
        winner = distances.index(min(distances))
        winners.add(winner)
        best = samples[winner]
        agreement = best.conditioning_ids[row, window] == best.token_ids[row, window]
        assert torch.equal(correct[row, window], agreement)
        assert torch.equal(mask[row, window], best.mask[row, window])
    assert len(winners) > 1


class TestMetric:
    def validate(self, directory: Path, num_drafts: int) -> dict[str, float]:
        module = make_module()
        module.num_drafts = num_drafts
        trainer = make_trainer(directory, limit_val_batches=1.0)
        return dict(trainer.validate(module, datamodule=tiny_data(eval_rows=8), verbose=False)[0])

    def test_is_logged_beside_the_others(self, tmp_path: Path) -> None:
        plain, several = self.validate(tmp_path, 1), self.validate(tmp_path, 3)
        best = several.pop("val/correct_tokens_best_of_3")
        assert 1.0 <= best <= 4.0
        assert {**several} == plain  # drawn after all others

    def test_is_reset(self, tmp_path: Path) -> None:
        module = make_module()
        module.num_drafts = 2
        trainer = make_trainer(tmp_path, limit_val_batches=1.0)
        first, second = (trainer.validate(module, datamodule=tiny_data(), verbose=False) for _ in range(2))
        assert first == second
        assert int(module.best_of_metrics.prefix_counts.sum()) == 0

    def test_refuses_none(self) -> None:
        module = make_module()
        with pytest.raises(ValueError, match="num_drafts >= 1, found 0"):
            DistillationModule(module.predictor.config, num_drafts=0)
