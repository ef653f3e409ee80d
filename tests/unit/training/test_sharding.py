"""What is refused before a network is shared out among processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from ptp_lightning.training.distributed.sharding import shard
from tests.helpers.tiny_distillation import make_module


def test_lightnings_own_strategy_is_refused() -> None:
    module, mesh = make_module(), cast(Any, None)
    module._trainer = SimpleNamespace(strategy=ModelParallelStrategy())  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"expected trainer.strategy .*FullyShardedStrategy, found ModelParallelStrat"):
        shard(module, [], mesh)
