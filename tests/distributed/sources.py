"""Windows that write down what each process drew, or fail on one of them, for tests; configurations name them."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ptp_lightning.models import PredictorNetwork
from ptp_lightning.models.context import Context
from ptp_lightning.training import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSample

FAILING_RANK = 1
REASON = "this process has had enough"


@dataclass(frozen=True)
class RecordedWindows(TeacherWindows):
    """Writes a line a step to `folder`/rank_X.jsonl: the rows, and the auxiliaries of their windows."""

    folder: str = "."

    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        sample = super().sample(predictor, context, generator)
        line = json.dumps([context.batch.input_ids.tolist(), sample.auxiliaries.tolist()])
        with (Path(self.folder) / f"rank_{torch.distributed.get_rank()}.jsonl").open("a") as file:
            file.write(f"{line}\n")
        return sample


@dataclass(frozen=True)
class FailingWindows(TeacherWindows):
    """Fails on one rank in the first step that finds a file at `after`."""

    way: Literal["raise", "kill", "nan"] = "raise"
    after: str = ""

    def sample(self, predictor: PredictorNetwork, context: Context, generator: torch.Generator) -> WindowSample:
        sample = super().sample(predictor, context, generator)
        if torch.distributed.get_rank() != FAILING_RANK or not Path(self.after).exists():
            return sample
        if self.way == "raise":
            raise ValueError(REASON)
        if self.way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return sample._replace(auxiliaries=sample.auxiliaries * torch.nan)
