"""What people do with `fit`: no logger, another logger, `--ckpt_path last`, odd epochs; each works or says why not."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import StochasticWeightAveraging

from ptp_lightning.export.stored_predictor import read_predictor
from ptp_lightning.training import cli
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

CONFIG = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny run in the current folder, as its user's `config.yaml`."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS_LINE * 400)
    plain = yaml.safe_load(shrink(CONFIG, corpus, tmp_path).read_text())
    plain["trainer"] |= {"fast_dev_run": False, "max_steps": 2, "num_sanity_val_steps": 0, "val_check_interval": 2}
    plain["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": "tiny"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain))
    monkeypatch.chdir(tmp_path)
    return path


def fit(*options: Any, command: str = "fit") -> None:
    cli.run([command, "--config", "config.yaml", *map(str, options)])


def steps_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_without_a_logger_or_a_progress_bar_nothing_of_the_user_is_overwritten(config: Path) -> None:
    before = config.read_bytes()
    fit("--trainer.logger", "false", "--trainer.enable_progress_bar", "false")
    assert config.read_bytes() == before
    assert steps_of(Path("runs/checkpoints/last.ckpt")) == 2


def test_the_configuration_is_written_into_the_folder_of_the_run(config: Path) -> None:
    fit("--trainer.max_steps", 1)
    written = yaml.safe_load(Path("runs/tiny/version_0/config.yaml").read_text())
    assert written["trainer"]["max_steps"] == 1


def test_ckpt_path_last_is_that_of_the_newest_run(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ptp_lightning")
    fit("--ckpt_path", "last")
    assert "No earlier run: starting anew" in caplog.text
    fit("--ckpt_path", "last", "--trainer.max_steps", 4)
    assert f"Resuming from {Path('runs/tiny/version_0/checkpoints/last.ckpt')}" in caplog.text
    fit("--ckpt_path", "last", "--trainer.max_steps", 6)
    assert [steps_of(Path(f"runs/tiny/version_{k}/checkpoints/last.ckpt")) for k in range(3)] == [2, 4, 6]


def test_ckpt_path_last_is_not_that_of_runs_without_a_name(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit("--trainer.logger", "false")
    caplog.set_level("INFO", logger="ptp_lightning")
    fit("--ckpt_path", "last")
    assert "No earlier run: starting anew" in caplog.text


def test_a_measurement_shows_the_summary_of_a_training(
    config: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit(command="validate")
    assert "without ckpt_path this measures an untrained model" in caplog.text
    caplog.clear()
    fit("--trainer.max_steps", 1)
    capsys.readouterr()
    fit("--ckpt_path", "last", command="test")
    assert "untrained" not in caplog.text
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Test" in lines and any(line.startswith("correct tokens of a window 1.") for line in lines)
    assert any(line.startswith("nll (nats) ") for line in lines) and "position accuracy given a correct prefix" in lines
    assert not any("test/accuracy" in line for line in lines)


def test_last_of_no_run_cannot_be_validated(config: Path) -> None:
    with pytest.raises(ValueError, match="expected an earlier run for ckpt_path last, found none"):
        fit("--ckpt_path", "last", command="validate")


@pytest.mark.parametrize("content", [b"", b"some text\n", b"PK\x03\x04 cut off"], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_checkpoint(content: bytes, config: Path) -> None:
    Path("bad.ckpt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^ckpt_path=.*bad\.ckpt cannot be read: expected a complete checkpoint[^\n]*$"
    ):
        fit("--ckpt_path", "bad.ckpt")


@pytest.mark.parametrize("content", [{"weight": torch.ones(1)}, [1, 2]], ids=["weights", "list"])
def test_a_file_of_something_else(content: Any, config: Path) -> None:
    torch.save(content, "foreign.ckpt")
    message = r"^expected a checkpoint of fit, found .*foreign\.ckpt, which holds something else: set ckpt_path$"
    with pytest.raises(ValueError, match=message):
        fit("--ckpt_path", "foreign.ckpt")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("made",)


def test_a_file_with_code_is_refused_without_advice_to_run_it(config: Path) -> None:
    torch.save({"state_dict": Evil()}, "evil.ckpt")
    message = (
        r"^ckpt_path=\S*evil\.ckpt cannot be read: expected weights and plain data, found \w+\.mkdir, which could run "
        r"code: ask for an exported folder \(safetensors\) where the file is not your own$"
    )
    with pytest.raises(ValueError, match=message):
        fit("--ckpt_path", "evil.ckpt")
    with pytest.raises(ValueError, match=message):
        read_predictor("evil.ckpt")
    assert not Path("made").exists()


def test_a_folder_is_no_checkpoint(config: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint file, found the folder"):
        fit("--ckpt_path", ".")


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_repository_of_the_hub_is_no_checkpoint(command: str, config: Path) -> None:
    message = (
        rf"^expected a checkpoint file of fit for {command}, found no file user/name@v1: set ckpt_path \(repositories "
        r"of the hub and exported folders serve generate, evaluate and export\)$"
    )
    with pytest.raises(ValueError, match=message):
        fit("--ckpt_path", "user/name@v1", command=command)


def test_an_epoch_that_does_not_divide_into_steps(config: Path) -> None:
    """Seven batches in threes: the third step of an epoch has one batch."""
    fit("--trainer.limit_train_batches", 7, "--trainer.accumulate_grad_batches", 3, "--trainer.max_steps", 8)
    assert steps_of(Path("runs/tiny/version_0/checkpoints/last.ckpt")) == 8


AVERAGING = "lightning.pytorch.callbacks.StochasticWeightAveraging"


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.callbacks+", AVERAGING, "--trainer.callbacks.swa_lrs", 0.01,
         "--trainer.callbacks.swa_epoch_start", 2],
        ["--trainer.callbacks+", f"[{{class_path: {AVERAGING}, init_args: {{swa_lrs: 0.01, swa_epoch_start: 2}}}}]"],
    ],
    ids=["class", "list"],
)  # fmt: skip
def test_averaged_weights_are_those_of_the_last_checkpoint(
    options: list[Any], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs of one step; the average is that of the weights at the start of the last three."""
    starts: list[torch.Tensor] = []
    update = StochasticWeightAveraging.update_parameters

    def recorded(average: Any, module: Any, *more: Any) -> None:
        starts.append(module.predictor.slot_encoder.placeholder.detach().clone())
        update(average, module, *more)

    monkeypatch.setattr(StochasticWeightAveraging, "update_parameters", staticmethod(recorded))
    fit(*options, "--trainer.limit_train_batches", 1, "--trainer.max_steps", 4)
    stored = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    assert len(starts) == 3 and not torch.equal(starts[0], starts[2]) and stored["global_step"] == 4
    torch.testing.assert_close(stored["state_dict"]["predictor.slot_encoder.placeholder"], torch.stack(starts).mean(0))


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_are_not_resumed_in_silence(name: str, config: Path) -> None:
    fit()
    averaging = ["--trainer.callbacks+", f"lightning.pytorch.callbacks.{name}"]
    if name == "StochasticWeightAveraging":
        averaging += ["--trainer.callbacks.swa_lrs", "0.01", "--trainer.limit_train_batches", "1"]
    message = f"^expected trainer.callbacks without {name} for a training that goes on from a checkpoint[^\\n]*$"
    for checkpoint in ("last", "runs/tiny/version_0/checkpoints/last.ckpt"):
        with pytest.raises(ValueError, match=message):
            fit(*averaging, "--ckpt_path", checkpoint)


def test_a_changing_accumulation_is_not_resumed(config: Path) -> None:
    """Lightning would go on with an accumulation of 1."""
    scheduler = ["--trainer.callbacks+", "lightning.pytorch.callbacks.GradientAccumulationScheduler"]
    scheduler += ["--trainer.callbacks.scheduling", "{0: 3, 1: 2}", "--trainer.limit_train_batches", "6"]
    fit(*scheduler)
    message = "^expected trainer.callbacks without GradientAccumulationScheduler [^\\n]*$"
    with pytest.raises(ValueError, match=message):
        fit(*scheduler, "--ckpt_path", "last")


def test_a_timer_ends_a_training(config: Path) -> None:
    """One of its defaults is a member of an enumeration, which YAML cannot write."""
    timer = ["--trainer.callbacks+", "lightning.pytorch.callbacks.Timer", "--trainer.callbacks.duration", "00:00:00:01"]
    fit(*timer, "--trainer.max_steps", 100_000)
    (stored,) = Path("runs").rglob("last.ckpt")
    assert 0 < steps_of(stored) < 100_000


def test_an_added_progress_bar_replaces_ours(config: Path) -> None:
    fit("--trainer.callbacks+", "lightning.pytorch.callbacks.TQDMProgressBar")
    assert list(Path("runs").rglob("last.ckpt"))


def test_checkpoints_of_errors_do_not_replace_those_of_a_training(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_exception = ["--trainer.callbacks+", "lightning.pytorch.callbacks.OnExceptionCheckpoint"]
    fit(*on_exception, "--trainer.callbacks.dirpath", "errors")
    assert "runs/tiny/version_0/checkpoints/last.ckpt" in capsys.readouterr().out


def test_validations_go_by_steps(config: Path) -> None:
    message = "^expected a whole number of steps for trainer.val_check_interval, found 0.25[^\\n]*$"
    with pytest.raises(ValueError, match=message):
        fit("--trainer.val_check_interval", 0.25)
    plain = yaml.safe_load(config.read_text())
    plain["trainer"]["val_check_interval"] = 0.25
    config.write_text(yaml.safe_dump(plain))
    with pytest.raises(ValueError, match=message):
        fit()


def test_nothing_is_logged_every_zero_steps(config: Path) -> None:
    fit("--trainer.log_every_n_steps", 0)
    header = Path("runs/tiny/version_0/metrics.csv").read_text().splitlines()[0]
    assert "val/correct_tokens" in header and "train/" not in header and "perf/tokens" not in header


def test_an_unknown_metric_to_stop_by_is_one_line(config: Path) -> None:
    message = (
        "^expected a metric of this run as monitor of EarlyStopping in trainer.callbacks, found nothing: set it to one "
        "of [^\\n`]*val/correct_tokens[^\\n`]*$"
    )
    stopping = "lightning.pytorch.callbacks.EarlyStopping"
    with pytest.raises(ValueError, match=message):
        fit("--trainer.callbacks+", stopping, "--trainer.callbacks.monitor", "nothing")


def test_an_unknown_metric_is_found_before_the_first_step(config: Path) -> None:
    message = (
        "^expected a metric of this run as monitor of EarlyStopping in trainer.callbacks, found val_loss: set it to "
        "one of [^\\n]*val/correct_tokens[^\\n]*$"
    )
    stopping = ["--trainer.callbacks+", "lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor"]
    with pytest.raises(ValueError, match=message):
        fit(*stopping, "val_loss", "--trainer.num_sanity_val_steps", 1)
    assert not list(Path("runs").rglob("*.ckpt"))
    fit(*stopping, "val/correct_tokens", "--trainer.num_sanity_val_steps", 1)


def test_a_misconfigured_trainer_is_one_line(config: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a valid duration[^\n]*: change the settings of trainer$"):
        fit("--trainer.max_time", "foo")


@pytest.mark.parametrize("key", ["checkpoint.dirpath", "trainer.logger.init_args.save_dir"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(key: str, config: Path) -> None:
    Path("taken").write_text("a file")
    with pytest.raises(ValueError, match=rf"^expected a folder that can be written, found \S*taken/x .*: set {key}$"):
        fit(f"--{key}", "taken/x")
    assert not Path("runs/tiny/version_0/metrics.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "logger", ["ptp_lightning.training.loggers.OverviewTensorBoardLogger", "lightning.pytorch.loggers.CSVLogger"]
)
def test_a_log_that_cannot_be_written_is_one_line(
    logger: str, config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may not grow above a limit, whose error is that of a full disk but for its number."""
    settings = {"save_dir": "runs", "name": "tiny"}
    settings |= {"flush_logs_every_n_steps": 1} if logger.endswith("CSVLogger") else {"max_queue": 1}
    plain = yaml.safe_load(config.read_text())
    plain["trainer"]["logger"] = {"class_path": logger, "init_args": settings}
    config.write_text(yaml.safe_dump(plain))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"^[^\n]*the log of the run in runs/tiny/version_0[^\n]*save_dir[^\n]*$"):
            fit("--trainer.max_steps=100000", "--trainer.log_every_n_steps=1", "--trainer.enable_checkpointing=false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Traceback" not in "".join(capfd.readouterr())
    for table in Path("runs").rglob("metrics.csv"):
        assert table.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_before_the_next_step(
    sent: signal.Signals, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    folder = Path("runs/tiny/version_0/checkpoints")

    def send() -> None:
        while not any(folder.glob("*.ckpt")):
            time.sleep(0.05)
        os.kill(os.getpid(), sent)

    threading.Thread(target=send, daemon=True).start()
    try:
        with pytest.raises(SystemExit, match=str(128 + sent)):
            fit("--trainer.max_steps", 100_000)
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    last = max(folder.glob("*.ckpt"), key=os.path.getmtime)
    text = "".join(capfd.readouterr())
    assert f"at step {steps_of(last)};" in text
    assert "Traceback" not in text and "was raised with message" not in text
