"""Two processes train as one does on all their rows, and each goes on from the other's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptp_lightning.models.backbone import BackboneSettings, load_backbone
from tests.distributed.runs import HALF, RUNS, STEPS, Outcome, outcome, together, train

TOLERANCE = 1e-5  # nats
# Muon orthogonalises in bfloat16, where the order of a sum shows. So it does where activations are in bfloat16: sums of
# other batches end on the other side of a border now and then.
ROUGH = {"muon": 5e-3, "bf16_base": 2e-2, "bf16_mixed": 5e-2, "bf16_true": 5e-2}
STRATEGIES = ("ddp", "fsdp2")
RESUMED = ("adapter", "copy", "muon")
OTHERS = [name for name in RUNS if name not in ("adapter", "muon_rank_1")]


def largest_difference(left: list[float], right: list[float]) -> float:
    return float((torch.tensor(left, dtype=torch.float64) - torch.tensor(right, dtype=torch.float64)).abs().max())


class Pair:
    """The same run by one process, and by two under each strategy."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.alone = {name: train(RUNS[name], folder / name) for name in names}
        runs = [f"{strategy}-{name}" for strategy in STRATEGIES for name in names]
        together(folder, *runs, *(f"{run}-resumed" for run in runs if run.partition("-")[2] in RESUMED))

    def together(self, strategy: str, name: str, *more: str) -> Outcome:
        return outcome(self.folder, "-".join([strategy, name, *more]))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("adapter"), ["adapter"])


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestAnAdapter:
    def test_the_losses_are_those_of_one_process(self, adapter: Pair, strategy: str) -> None:
        alone, shared = adapter.alone["adapter"].losses, adapter.together(strategy, "adapter").losses
        assert len(alone) == len(shared) == STEPS
        assert abs(alone[0] - alone[-1]) > 0.5  # it has learned something
        assert largest_difference(alone, shared) < TOLERANCE

    def test_a_checkpoint_is_validated_alike(self, adapter: Pair, strategy: str) -> None:
        alone, shared = adapter.alone["adapter"].validated, adapter.together(strategy, "adapter").validated
        assert alone["val/correct_tokens"] > 1
        assert shared == pytest.approx(alone, rel=1e-5)

    def test_a_process_holds_its_share(self, adapter: Pair, strategy: str) -> None:
        share = adapter.together(strategy, "adapter").share
        assert share == 1 if strategy == "ddp" else share == pytest.approx(0.5, abs=0.01)

    def test_two_go_on_from_one(self, adapter: Pair, strategy: str) -> None:
        resumed = adapter.together(strategy, "adapter", "resumed").losses
        assert largest_difference(adapter.alone["adapter"].losses[HALF:], resumed) < TOLERANCE

    def test_one_goes_on_from_two(self, adapter: Pair, strategy: str, tmp_path: Path) -> None:
        half = adapter.folder / f"{strategy}-adapter" / "half.ckpt"
        resumed = train(RUNS["adapter"], tmp_path, resume=half).losses
        assert largest_difference(adapter.alone["adapter"].losses[HALF:], resumed) < TOLERANCE

    def test_their_checkpoint_is_that_of_one_process(self, adapter: Pair, strategy: str) -> None:
        alone, shared = (
            torch.load(adapter.folder / run / "end.ckpt", weights_only=True)
            for run in ("adapter", f"{strategy}-adapter")
        )
        assert alone.keys() == shared.keys()
        torch.testing.assert_close(shared["state_dict"], alone["state_dict"], rtol=1e-4, atol=1e-4)
        assert alone["predictor"] == shared["predictor"]  # what was validated, too


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("others"), OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_losses_are_those_of_one_process(others: Pair, strategy: str, name: str) -> None:
    alone, shared = others.alone[name].losses, others.together(strategy, name).losses
    assert len(alone) == len(shared)
    assert largest_difference(alone, shared) < ROUGH.get(name, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy", "muon"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_go_on_from_one(others: Pair, strategy: str, name: str) -> None:
    resumed = others.together(strategy, name, "resumed").losses
    assert largest_difference(others.alone[name].losses[HALF:], resumed) < ROUGH.get(name, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_model_is_written(others: Pair, strategy: str) -> None:
    alone, shared = (
        load_backbone(BackboneSettings(str(others.folder / run / "model"))).state_dict()
        for run in ("autoregressive", f"{strategy}-autoregressive")
    )
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_muon_needs_a_row_a_process(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"at least 2 rows, .* found 1 in .*lora_A.*set optimizer.name to adamw"):
        together(tmp_path, "fsdp2-muon_rank_1")
