"""A training that is killed goes on with exactly the documents that it would have seen, on one process and on two."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.forked_process import ForkedProcess, run_file
from tests.helpers.tiny_data import tiny_tokenizer

PATIENCE_SECONDS = 200.0
PERIOD = 4  # steps between checkpoints
NUM_STEPS = 26
NUM_DOCUMENTS = 24

# What it has trained on stands in a file for each process: a line per step, the first letters of its rows.
PROGRAM = """
import json, os, sys, time
import lightning, torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ptp_lightning.data import JsonLines, StreamingCorpus, StreamPart
from ptp_lightning.training.distributed.termination import TerminateTogether

folder, num_processes, num_workers, delay, max_steps, checkpoint = json.loads(sys.argv[1])


class Recorder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.rows = batch.input_ids[:, 0].tolist()
        time.sleep(delay)
        return self.weight * batch.input_ids.float().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with open(f"{folder}/rank{self.global_rank}.txt", "a") as file:
            file.write(json.dumps([self.trainer.global_step, self.rows]) + "\\n")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


data = StreamingCorpus(
    [StreamPart(JsonLines([f"{folder}/documents.jsonl"]))], tokenizer=f"{folder}/tokenizer", row_length=5, batch_size=2,
    num_windows=1, shuffle_documents=5, num_workers=num_workers,
    eval_parts=[StreamPart(JsonLines([f"{folder}/documents.jsonl"]))],
)
trainer = lightning.Trainer(
    accelerator="cpu", devices=num_processes, strategy="ddp" if num_processes > 1 else "auto", max_steps=max_steps,
    limit_val_batches=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[
        ModelCheckpoint(folder, "{step}", every_n_train_steps=PERIOD, save_top_k=-1, save_on_exception=True),
        TerminateTogether(),
    ],
)
trainer.fit(Recorder(), data, ckpt_path=checkpoint)
""".replace("PERIOD", str(PERIOD))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Document k says "kkkk" with the k-th letter, which makes a row of its own."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"text": 4 * chr(ord("a") + number)}) for number in range(NUM_DOCUMENTS)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def start(
    folder: Path, processes: int, workers: int, steps: int, delay: float, checkpoint: Path | None
) -> ForkedProcess:
    options = json.dumps([str(folder), processes, workers, delay, steps, checkpoint and str(checkpoint)])
    return ForkedProcess(run_file, folder / "program.py", options, folder=folder)


def steps_seen(folder: Path, rank: int) -> dict[int, list[int]]:
    """What each step was trained on; a repeated one must have been repeated exactly."""
    seen: dict[int, list[int]] = {}
    path = folder / f"rank{rank}.txt"
    for line in path.read_text().splitlines() if path.exists() else []:
        step, rows = json.loads(line)
        assert seen.setdefault(step, rows) == rows
    return seen


@pytest.mark.parametrize(
    ("processes", "workers", "stop"),
    [
        (1, 2, signal.SIGKILL),
        # Slow: what two processes read is tested in tests/unit/data, and that they stop together in tests/distributed.
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1, 0, signal.SIGKILL),
                (1, 2, signal.SIGTERM),
                (2, 0, signal.SIGKILL),
                (2, 0, signal.SIGTERM),
                (2, 1, signal.SIGTERM),
            )
        ),
    ],
)
@pytest.mark.timeout(900)
def test_a_killed_training_goes_on(folder: Path, processes: int, workers: int, stop: signal.Signals) -> None:
    run = start(folder, processes, workers, 10**6, 0.1, None)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(steps_seen(folder, 0)) < 2 * PERIOD + 2:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        # In the middle of a period; whoever ends a run politely speaks to its main process.
        (os.kill if stop == signal.SIGTERM else os.killpg)(run.pid, stop)
        run.wait(PATIENCE_SECONDS)
    finally:
        run.kill()
    saved = {int(path.stem.partition("=")[2]): path for path in folder.glob("*.ckpt")}
    checkpoint = saved[max(saved)]
    before = [steps_seen(folder, rank) for rank in range(processes)]
    if stop == signal.SIGTERM:  # saved behind the last step
        assert [max(steps) for steps in before] == [max(saved)] * processes

    resumed = start(folder, processes, workers, NUM_STEPS, 0.0, checkpoint)
    output = resumed.communicate(timeout=PATIENCE_SECONDS)
    assert resumed.returncode == 0, output

    seen = [steps_seen(folder, rank) for rank in range(processes)]
    assert all(set(steps) == set(range(1, NUM_STEPS + 1)) for steps in seen)
    assert all(before[rank].items() <= seen[rank].items() for rank in range(processes))
    per_process = NUM_DOCUMENTS // processes
    for epoch in range(2 * NUM_STEPS // per_process):
        place = slice(epoch * per_process, (epoch + 1) * per_process)
        shares = [[row for step in sorted(steps) for row in steps[step]][place] for steps in seen]
        assert sorted(row for share in shares for row in share) == list(range(1, NUM_DOCUMENTS + 1))
