"""The command line on two processes, started in every supported way; and what is left when one of them fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptp_lightning.batch import PackedBatch
from tests.distributed.sources import REASON
from tests.helpers.slurm_tasks import task_environment
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PATIENCE_SECONDS = 150.0
PERIOD = 3  # steps between checkpoints
STEPS = 4
ALONE = ("-m", "ptp_lightning")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ptp_lightning")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def checkpoint_in(folder: Path) -> Path:
    return folder / "runs" / "gated_lora" / "version_0" / "checkpoints" / "last.ckpt"


class Job:
    """A tiny run in a folder of its own."""

    def __init__(self, folder: Path, source: dict[str, Any]) -> None:
        corpus = folder / "corpus"
        corpus.mkdir(exist_ok=True)
        for number in range(2):  # processes share documents out among themselves
            (corpus / f"{number}.txt").write_text(f"# {number}\n{CORPUS_LINE}" * 400)
        self.folder = folder
        self.config = shrink(CONFIGS / "gated_lora.yaml", corpus, folder)
        config = yaml.safe_load(self.config.read_text())
        config["model"]["init_args"]["source"] = source
        config["model"]["init_args"]["optimizer"] = {"learning_rate": 0.001, "warmup_steps": 1}
        config["trainer"] |= {"fast_dev_run": False, "max_steps": STEPS, "limit_val_batches": 1}
        config["checkpoint"] = {"every_n_train_steps": PERIOD}
        self.config.write_text(yaml.safe_dump(config))

    def start(self, prefix: tuple[str, ...], *more: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *prefix, "fit", "--config", str(self.config), *more],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
        )

    def run(self, launcher: str, *more: str) -> tuple[int, str]:
        """Exit status and what was printed; of SLURM's tasks, that of the first."""
        if launcher != "alone":
            more = (*more, "--trainer.devices", "2")
        if launcher == "torchrun":
            jobs = [self.start(TORCHRUN, *more)]
        elif launcher == "slurm":
            port = free_port()
            jobs = [self.start(ALONE, *more, **task_environment(rank, 2, port)) for rank in range(2)]
        else:
            jobs = [self.start(ALONE, *more)]
        try:
            printed = [job.communicate(timeout=PATIENCE_SECONDS)[0] for job in jobs]
        finally:
            for job in jobs:
                job.kill()
        return jobs[0].returncode, "".join(printed)


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [("torchrun", "ddp.yaml"), ("torchrun", "fsdp2.yaml"), ("slurm", "ddp.yaml"), ("lightning", "fsdp2.yaml")],
)
def test_ranks_draw_their_own_rows_and_auxiliaries(tmp_path: Path, launcher: str, strategy: str) -> None:
    source = {"class_path": "tests.distributed.sources.RecordedWindows", "init_args": {"folder": str(tmp_path)}}
    status, printed = Job(tmp_path, source).run(launcher, "--config", str(CONFIGS / "strategy" / strategy))
    assert status == 0, printed
    assert "It is recommended to use `self.log" not in printed
    assert sorted(file.name for file in tmp_path.glob("rank_*.jsonl")) == ["rank_0.jsonl", "rank_1.jsonl"]
    steps = [
        [json.loads(line) for line in (tmp_path / f"rank_{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    ]
    assert [len(of_rank) for of_rank in steps] == [STEPS, STEPS]
    drawn = [str(rows) for of_rank in steps for rows, _ in of_rank]
    auxiliaries = [str(values) for of_rank in steps for _, values in of_rank]
    assert len(set(drawn)) == len(set(auxiliaries)) == 2 * STEPS


@pytest.mark.parametrize(
    ("launcher", "strategy", "way"),
    [
        ("torchrun", "ddp.yaml", "raise"),
        ("lightning", "fsdp2.yaml", "raise"),
        ("torchrun", "fsdp2.yaml", "kill"),
        ("lightning", "ddp.yaml", "kill"),
        ("torchrun", "ddp.yaml", "nan"),
        ("lightning", "fsdp2.yaml", "nan"),
    ],
)
def test_a_process_that_fails_ends_the_job(tmp_path: Path, launcher: str, strategy: str, way: str) -> None:
    checkpoint = checkpoint_in(tmp_path)
    arguments = {"way": way, "after": str(checkpoint)}
    job = Job(tmp_path, {"class_path": "tests.distributed.sources.FailingWindows", "init_args": arguments})
    begin = time.monotonic()
    status, printed = job.run(launcher, "--config", str(CONFIGS / "strategy" / strategy), "--trainer.max_steps", "1000")
    assert status != 0
    assert time.monotonic() - begin < PATIENCE_SECONDS / 2
    kept = list(tmp_path.rglob("not_finite*"))
    if way == "raise":
        assert REASON in printed
    elif way == "kill":
        assert "SIGKILL" in printed
    else:
        (file,) = kept
        assert file.name == f"not_finite_step_{PERIOD}_rank_1.pt"
        assert f"the batch is in {file.relative_to(tmp_path)}" in printed
        (batch,) = torch.load(file, weights_only=True)["batches"]
        assert PackedBatch(**batch).input_ids.shape == (2, 32)
    assert bool(kept) == (way == "nan")

    stored = torch.load(checkpoint, weights_only=True)
    assert stored["global_step"] == PERIOD
    assert all(value.isfinite().all() for value in stored["state_dict"].values())
    again = Job(tmp_path, {"class_path": "ptp_lightning.training.TeacherWindows"})
    status, printed = again.run("alone", "--ckpt_path", str(checkpoint), "--trainer.max_steps", str(PERIOD + 1))
    assert status == 0, printed


def test_ctrl_c_ends_all_behind_the_same_step(tmp_path: Path) -> None:
    checkpoint = checkpoint_in(tmp_path)
    job = Job(tmp_path, {"class_path": "ptp_lightning.training.TeacherWindows"})
    options = ("--trainer.devices", "2", "--trainer.max_steps", "1000000", "--trainer.val_check_interval", "1000000")
    run = job.start(ALONE, "--config", str(CONFIGS / "strategy" / "fsdp2.yaml"), *options)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not checkpoint.exists():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        printed, _ = run.communicate(timeout=PATIENCE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 1
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert step > 0
    assert f"at step {step};" in printed  # where it stopped, not where it last wrote a periodic one
