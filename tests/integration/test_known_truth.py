"""The theorems in numbers: students of a Markov chain with known conditionals, trained by configs/markov_*.yaml."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ptp_lightning.cli import main
from ptp_lightning.data.series.markov import MarkovSeries

CONFIGS = Path(__file__).parents[2] / "configs"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, float]:
    """Train as the configuration says; the last value of every tag in TensorBoard's file."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", str(CONFIGS / f"{name}.yaml"), *options])
    main()
    events = EventAccumulator(str(folder / "runs" / name / "version_0"))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(("order", "steps"), [(1, 600), (2, 3000)])
def test_categorical_learns_the_conditionals(
    order: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theorem 2: from u alone, without the tokens between, to within 0.01 nats at every position."""
    options = ["--data.init_args.series.init_args.order", str(order), "--data.init_args.min_context", str(order)]
    options += ["--trainer.max_steps", str(steps)]
    found = run("markov_categorical", tmp_path, monkeypatch, *options)
    divergences = [found[f"val/kl/position_{j:02d}"] for j in (1, 2, 3)]
    assert max(divergences) < 0.01, divergences


def test_one_hot_learns_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theorem 1: given u_k too, nothing is left to chance."""
    found = run("markov_one_hot", tmp_path, monkeypatch)
    cross_entropies = [math.log(found[f"val/perplexity/position_{j:02d}"]) for j in (1, 2, 3)]
    assert max(cross_entropies) < 0.05, cross_entropies


def test_independent_stops_at_the_product_of_marginals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot know is the mutual information with the window's earlier tokens; all else it learns."""
    found = run("markov_independent", tmp_path, monkeypatch)
    floor = MarkovSeries(order=1, vocab_size=5, entropy=1.0).marginal_divergence(4).tolist()
    for j in (1, 2, 3):
        assert found[f"val/kl/position_{j:02d}"] == pytest.approx(floor[j], abs=0.02)
