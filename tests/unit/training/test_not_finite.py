"""A loss or a gradient that is a NaN stops the run before the weights are affected, with the batch on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ptp_lightning.batch import PackedBatch
from ptp_lightning.losses import LossSum
from ptp_lightning.training import DistillationModule
from ptp_lightning.training.modules.training_module import NotFiniteError
from tests.helpers.tiny_data import tiny_data
from tests.helpers.tiny_distillation import make_module, make_trainer, weights

BROKEN_BATCH = 5  # the second one of the third step


def breaks(module: DistillationModule, where: str) -> list[PackedBatch]:
    """Let one batch have a loss or a gradient that is no number; returns all batches, as they come."""
    seen: list[PackedBatch] = []
    step, total = module.training_step, module._corrected_loss
    bias = module.predictor.slot_encoder.placeholder
    bias.register_hook(lambda gradient: gradient * torch.inf if where == "gradient" and is_broken() else gradient)

    def is_broken() -> bool:
        return len(seen) == BROKEN_BATCH + 1

    def refined(*args: Any) -> LossSum:
        loss = total(*args)
        return loss._replace(total=loss.total * torch.nan) if where == "loss" and is_broken() else loss

    def training_step(batch: PackedBatch, batch_idx: int) -> Any:
        seen.append(batch)
        return step(batch, batch_idx)

    module.training_step, module._corrected_loss = training_step, refined
    return seen


@pytest.mark.parametrize(
    ("where", "blamed"), [("loss", [BROKEN_BATCH]), ("gradient", [BROKEN_BATCH - 1, BROKEN_BATCH])]
)
def test_it_stops_before_the_step(tmp_path: Path, where: str, blamed: list[int]) -> None:
    module = make_module()
    seen = breaks(module, where)
    checkpoints = ModelCheckpoint(
        tmp_path, save_last=True, save_top_k=0, every_n_train_steps=100, save_on_exception=True
    )
    options: dict[str, Any] = {"max_steps": 9, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    trainer = make_trainer(tmp_path, callbacks=[checkpoints], **(options | {"enable_checkpointing": True}))
    with pytest.raises(
        NotFiniteError, match="at step 2, found losses .* the batch is in .*not_finite_step_2_rank_0.pt"
    ):
        trainer.fit(module, datamodule=tiny_data())
    kept = torch.load(tmp_path / "not_finite_step_2_rank_0.pt", weights_only=True)
    assert (kept["global_step"], kept["rank"]) == (2, 0)
    batches = [PackedBatch(**batch) for batch in kept["batches"]]
    torch.testing.assert_close(batches, [seen[number] for number in blamed], rtol=0, atol=0)
    assert all(value.isfinite().all() for value in weights(module).values())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2

    again = make_module()
    make_trainer(tmp_path, max_steps=3).fit(again, datamodule=tiny_data(), ckpt_path=tmp_path / "last.ckpt")


def test_a_scaler_may_leave_a_step_out() -> None:
    """Float16 overflows now and then: its gradient scaler then takes no step and scales less."""
    module = make_module()
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()), accumulate_grad_batches=1)
    module._trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    placeholder = module.predictor.slot_encoder.placeholder
    placeholder.grad = torch.full_like(placeholder, torch.inf)
    module.on_before_optimizer_step(torch.optim.SGD([placeholder]))
