"""A run that is stopped, politely or not, leaves a checkpoint that can be decoded with and gone on from."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from ptp_lightning import ParallelTokenPredictor
from tests.helpers.forked_process import ForkedProcess, run_command
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

CONFIG = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"
PATIENCE_SECONDS = 120.0
PERIOD = 5  # steps between checkpoints


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A tiny run that goes on for ever and writes a checkpoint every `PERIOD` steps."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS_LINE * 400)
    path = shrink(CONFIG, corpus, tmp_path)
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["predictor"]["backbone"] = {"path": "embedded"}  # can be loaded again
    config["trainer"] |= {"fast_dev_run": False, "max_steps": 1_000_000, "val_check_interval": 1_000_000}
    config["checkpoint"] = {"every_n_train_steps": PERIOD}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_command_that_is_stopped_says_so_in_one_line(command: str, sent: signal.Signals, tmp_path: Path) -> None:
    """The signal reaches the whole process group, as on a terminal or from a scheduler."""
    options = {"generate": ["--prompt", "def "], "evaluate": ["--output", "out"]}[command]
    run = ForkedProcess(run_command, command, *options, "--max_new_tokens", "1000", folder=tmp_path)
    try:
        if command == "generate":
            run.wait_for_output("def ")
        else:
            wait_for(tmp_path / "out" / "run.json", run)
        os.killpg(run.pid, sent)
        out, err = run.communicate(timeout=PATIENCE_SECONDS)
    finally:
        run.kill()
    assert run.returncode == 128 + sent
    assert "Traceback" not in out + err
    name = "Ctrl-C" if sent == signal.SIGINT else "SIGTERM"
    assert err.splitlines()[-1] == f"stopped by {name}"


def fit(config: Path, *more: str) -> ForkedProcess:
    return ForkedProcess(run_command, "fit", "--config", str(config), *more, folder=config.parent)


def test_a_training_that_is_ended_while_it_loads_says_so(endless: Path) -> None:
    run = fit(endless)
    try:
        run.wait_for_output("Seed set to 0")
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=PATIENCE_SECONDS)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    # Lightning may have begun the first validation.
    assert err.splitlines()[-1] in ("stopped by SIGTERM", "Resume      the same command with --ckpt_path last")


def wait_for(file: Path, run: ForkedProcess) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, f"no {file.name} in {PATIENCE_SECONDS} s"
        time.sleep(0.05)


# Ctrl-C is slow: tests/integration/test_training_habits.py sends it to a training in the process of the test.
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(signal.SIGINT, id="ctrl-c", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, id="kill -9"),
    ],
)
def test_a_stopped_run_leaves_a_checkpoint_that_goes_on(endless: Path, sent: signal.Signals) -> None:
    last = endless.parent / "runs" / "gated_lora" / "version_0" / "checkpoints" / "last.ckpt"
    run = fit(endless)
    try:
        wait_for(last, run)
        time.sleep(0.5)  # somewhere among the next steps
        run.send_signal(sent)
        output = "".join(run.communicate(timeout=PATIENCE_SECONDS))
    finally:
        run.kill()
    assert "Traceback" not in output

    step = torch.load(last, weights_only=True)["global_step"]
    if sent == signal.SIGINT:
        assert f"at step {step};" in output  # the step at which it stopped, not that of the last periodic checkpoint
    else:
        assert step > 0 and step % PERIOD == 0
    predictor = ParallelTokenPredictor.from_pretrained(last)
    fast, reference = (
        predictor.generate("def ", max_new_tokens=8, decoder=name) for name in ("speculative", "autoregressive")
    )
    assert fast.token_ids == reference.token_ids

    resumed = fit(endless, "--ckpt_path", str(last), "--trainer.max_steps", str(step + 2))
    output = "".join(resumed.communicate(timeout=PATIENCE_SECONDS))
    assert resumed.returncode == 0, output
    (second,) = (last.parents[2] / "version_1" / "checkpoints").glob("*.ckpt")
    assert torch.load(second, weights_only=True)["global_step"] == step + 2
