"""From a run's checkpoint to a folder, through the command line: what `fit` writes is what `export` reads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from ptp_lightning.cli import HELP, main
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.export.stored_predictor import EXPORTED_FILES, read_predictor
from ptp_lightning.models import BackboneSettings, LoraSettings, PredictorConfig, PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training import AutoregressiveModule, DistillationModule, OptimizerSettings
from tests.helpers.tiny_data import tiny_data, tiny_tokenizer
from tests.helpers.tiny_models import tiny_llama

SAMPLING = SamplingConfig(temperature=0.8, top_k=8, top_p=0.9)


class Run:
    """A base model on disk, two steps of training on it, and the checkpoint that Lightning wrote by itself."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        # A large vocabulary: its table would dwarf everything that is trained.
        tiny_llama(vocab_size=16384).save_pretrained(self.base)
        tiny_tokenizer().save_pretrained(self.base)
        config = PredictorConfig(
            BackboneSettings(path=str(self.base)), lora=LoraSettings(rank=2), sampling=SAMPLING, window_length=4
        )
        self.module = DistillationModule(config, optimizer=OptimizerSettings(warmup_steps=1))
        fit(self.module, folder)
        self.checkpoint = folder / "last.ckpt"
        assert self.module.val_summary is not None
        self.training = {"steps": 2, "prefix_counts": self.module.val_summary.prefix_counts.tolist()}


def fit(module: DistillationModule | AutoregressiveModule, folder: Path) -> None:
    Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)],
    ).fit(module, datamodule=tiny_data())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["ptp_lightning", "export", *map(str, args)])
        main()

    return call


def same_weights(one: PredictorNetwork, other: PredictorNetwork) -> bool:
    ours, theirs = one.trainable_state(), other.trainable_state()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)


def test_checkpoint_of_a_run_holds_no_base_weight_and_opens(run: Run) -> None:
    table_bytes = 16384 * 32 * 4
    assert run.checkpoint.stat().st_size < table_bytes / 4  # slot encoder, adapter and optimiser states
    loaded = load_network(run.checkpoint)
    assert same_weights(run.module.predictor, loaded)
    assert loaded.config == run.module.predictor.config
    assert not loaded.training
    assert any(weight.any() for name, weight in loaded.trainable_state().items() if "lora_B" in name)


def test_truncated_checkpoint(run: Run, tmp_path: Path) -> None:
    whole = run.checkpoint.read_bytes()
    for kept in (10, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.ckpt").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"^ckpt_path=.*cut\.ckpt cannot be read: [^\n]*$"):
            load_network(tmp_path / "cut.ckpt")


def test_export_writes_what_it_says(run: Run, export, capsys: pytest.CaptureFixture[str]) -> None:
    export("--ckpt_path", run.checkpoint, "--output", "my adapter")
    printed, notes = capsys.readouterr()
    assert f"note: the base model is {run.base} of this machine" in notes
    assert same_weights(run.module.predictor, load_network("my adapter"))
    assert read_predictor("my adapter").training == run.training
    for name in EXPORTED_FILES:
        assert f"  {name} " in printed
    assert printed.endswith("Next  python -m ptp_lightning generate --ckpt_path 'my adapter' --prompt \"def \"\n")


def test_export_of_an_export_in_bfloat16(run: Run, export) -> None:
    export("--ckpt_path", run.checkpoint, "--output", "large")
    export("--ckpt_path", "large", "--output", "small", "--dtype", "bfloat16")
    assert {weight.dtype for weight in load_file("small/adapter_model.safetensors").values()} == {torch.bfloat16}
    assert read_predictor("small").training == run.training
    assert sum(file.stat().st_size for file in Path("small").glob("*.safetensors")) < 0.7 * sum(
        file.stat().st_size for file in Path("large").glob("*.safetensors")
    )


def test_export_names_another_place_of_the_base_model(run: Run, export, tmp_path: Path) -> None:
    shutil.copytree(run.base, tmp_path / "user" / "model")  # as an id of the hub
    export("--ckpt_path", run.checkpoint, "--output", "out", "--base", "user/model")
    assert read_predictor("out").config["backbone"]["path"] == "user/model"


def test_overwrite(run: Run, export, capsys: pytest.CaptureFixture[str]) -> None:
    export("--ckpt_path", run.checkpoint, "--output", "out")
    with pytest.raises(SystemExit, match="2"):
        export("--ckpt_path", run.checkpoint, "--output", "out")
    assert "new or empty" in capsys.readouterr().err
    export("--ckpt_path", run.checkpoint, "--output", "out", "--overwrite")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--ckpt_path nowhere.ckpt --output out", "found nothing: set ckpt_path"),
        ("--ckpt_path broken.ckpt --output out", "broken.ckpt cannot be read"),
        ("--ckpt_path broken.ckpt --output broken.ckpt", "expected a folder to write to, found the file"),
        ("--output out", "ckpt_path"),
        ("--ckpt_path broken.ckpt --output out --dtype float16", "bfloat16"),
        ("--ckpt_path broken.ckpt --outptu out", "outptu"),
    ],
)
def test_mistakes_cost_one_line(export, capsys: pytest.CaptureFixture[str], args: str, message: str) -> None:
    Path("broken.ckpt").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="2"):
        export(*args.split())
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert [file.name for file in Path().iterdir()] == ["broken.ckpt"]


def test_another_base_model(run: Run, export, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run.base.rename(tmp_path / "kept")
    try:
        tiny_llama(vocab_size=16384, rms_norm_eps=0.1, hidden_size=64).save_pretrained(run.base)
        with pytest.raises(SystemExit, match="2"):
            export("--ckpt_path", run.checkpoint, "--output", "out")
    finally:
        for file in run.base.iterdir():
            file.unlink()
        run.base.rmdir()
        (tmp_path / "kept").rename(run.base)
    assert "found another base model" in capsys.readouterr().err
    assert not Path("out").exists()


def test_place_that_cannot_be_written(run: Run, export, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        export("--ckpt_path", run.checkpoint, "--output", "file/out")
    assert "cannot write file/out" in capsys.readouterr().err


def test_a_checkpoint_without_a_predictor_is_refused(
    export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    fit(AutoregressiveModule(BackboneSettings(path=str(tmp_path / "base")), OptimizerSettings()), tmp_path)
    with pytest.raises(SystemExit, match="2"):
        export("--ckpt_path", tmp_path / "last.ckpt", "--output", "out")
    assert "expected a checkpoint with a predictor" in capsys.readouterr().err


def test_help(export, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        export("--help")
    printed = capsys.readouterr().out
    for option in ("--ckpt_path", "--output", "--dtype", "--overwrite"):
        assert option in printed
        assert option in HELP
