"""AnalyticWindows: the chain's conditionals, token after token, for readable contexts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.series.markov import MarkovSeries
from ptp_lightning.data.series.series_datamodule import SeriesDataModule
from ptp_lightning.sampling import SamplingConfig, TokenDistribution
from ptp_lightning.training.windows.analytic_windows import AnalyticWindows
from ptp_lightning.training.windows.window_source import WindowSample
from tests.helpers.tiny_distillation import by_objective, make_module, make_trainer

SERIES = MarkovSeries(order=2, vocab_size=4, entropy=0.9)
BEGINNING = 4
ROWS = [[BEGINNING, 3, 1, 0, 2, 2], [BEGINNING, 0, 0, 1, 3, 2]]
STARTS = [[1, 2, 5], [3, 3, 4]]


def sample_with(sampling: SamplingConfig, seed: int = 0) -> WindowSample:
    rows = torch.tensor(ROWS)
    positions = torch.arange(6).expand_as(rows)
    batch = PackedBatch(rows, torch.zeros_like(rows), positions, torch.tensor(STARTS), positions >= 1)
    base_model = SimpleNamespace(config=SimpleNamespace(vocab_size=7))
    predictor: Any = SimpleNamespace(config=SimpleNamespace(window_length=3), base_model=base_model)
    context: Any = SimpleNamespace(batch=batch, sampling=sampling)
    return AnalyticWindows(SERIES).sample(predictor, context, torch.Generator().manual_seed(seed))


def test_teacher_is_the_chain_given_the_tokens_before() -> None:
    sample = sample_with(SamplingConfig())
    assert sample.teacher.materialize().token_ids is None and sample.teacher.materialize().probabilities.shape == (
        2,
        3,
        3,
        7,
    )
    for row in range(2):
        for window, start in enumerate(STARTS[row]):
            tokens = [BEGINNING, *ROWS[row][:start]]  # one more unknown token before the row
            for offset in range(3):
                expected = SERIES.conditionals(torch.tensor(tokens[-2:])).float()
                torch.testing.assert_close(
                    sample.teacher.materialize().probabilities[row, window, offset, :4], expected
                )
                assert not sample.teacher.materialize().probabilities[row, window, offset, 4:].any()
                tokens.append(int(sample.token_ids[row, window, offset]))


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.5, top_k=3, top_p=0.8, order="descending")])
def test_auxiliaries_pick_the_tokens(sampling: SamplingConfig) -> None:
    sample = sample_with(sampling)
    assert torch.equal(pick(sample.auxiliaries, sample.teacher.materialize()), sample.token_ids)
    assert sample.mask.all() and int(sample.token_ids.max()) < 4
    assert sample.auxiliaries.dtype == torch.float64 and sample.auxiliaries.unique().numel() == 2 * 3 * 3


def test_sampling_settings_act_on_the_chain() -> None:
    sharp = sample_with(SamplingConfig(temperature=0.5)).teacher.materialize().probabilities[0, 0, 0, :4].double()
    squares = SERIES.conditionals(torch.tensor([BEGINNING, BEGINNING])) ** 2
    torch.testing.assert_close(sharp, squares / squares.sum(), atol=1e-6, rtol=0)


@by_objective
def test_every_objective_trains_and_logs_its_divergence(tmp_path: Path, objective: Any, loss: Any) -> None:
    source = AnalyticWindows(SERIES)
    module = make_module(loss=loss, source=source, objective=objective, sampling=SamplingConfig())
    trainer = make_trainer(tmp_path, val_check_interval=2)
    trainer.fit(module, datamodule=SeriesDataModule(SERIES, row_length=6, batch_size=4, num_windows=2, eval_rows=4))
    tags = {tag for tag in trainer.callback_metrics if tag.startswith("val/kl/")}
    if objective.predicts_distribution:
        assert tags == {f"val/kl/position_{j:02d}" for j in (1, 2, 3)}
    else:
        assert not tags


def test_divergence_against_a_float64_reference(tmp_path: Path) -> None:
    """The logged numbers are sum Q log(Q / P), averaged over the windows of all batches."""
    module = make_module(source=AnalyticWindows(SERIES), sampling=SamplingConfig())
    data = SeriesDataModule(SERIES, row_length=6, batch_size=4, num_windows=2, eval_rows=8)
    samples: list[WindowSample] = []
    logits: list[Tensor] = []  # of each batch, the last of whole windows that are asked for: of the refined slots
    sample, slot_logits = module.val_source.sample, module.predictor.slot_logits

    def record_sample(*arguments: Any) -> WindowSample:
        samples.append(sample(*arguments))
        logits.append(torch.empty(0))
        return samples[-1]

    def record_logits(hidden: Tensor) -> Tensor:
        found = slot_logits(hidden)
        if hidden.ndim == 4:  # not the slots of a loss, one after the other
            logits[-1] = found
        return found

    object.__setattr__(module.val_source, "sample", record_sample)
    module.predictor.slot_logits = record_logits
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    P = torch.cat(logits).double().log_softmax(-1)
    Q = torch.cat([TokenDistribution(*found.target.materialize()).probabilities for found in samples])[
        :, :, 1:
    ].double()
    expected = (Q * (Q.clamp_min(1e-300).log() - P)).sum(-1).mean((0, 1))
    assert [metrics[f"val/kl/position_{j:02d}"] for j in (1, 2, 3)] == pytest.approx(expected.tolist(), rel=1e-5)
