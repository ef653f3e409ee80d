"""A student that is a whole copy, from YAML to text: `generate` gives what the teacher samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ptp_lightning.cli import main
from ptp_lightning.models import FullCopyStudent, ParallelTokenPredictor
from tests.tiny_configs import CORPUS_LINE, shrink
from tests.tiny_data import tiny_tokenizer
from tests.tiny_models import tiny_llama

CONFIG = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two steps on a tiny base model, refiner included."""
    base, corpus = tmp_path / "base", tmp_path / "corpus.txt"
    tiny_llama(vocab_size=64).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    corpus.write_text(CORPUS_LINE * 400)
    config = yaml.safe_load(shrink(CONFIG, corpus, tmp_path).read_text())
    predictor = config["model"]["init_args"]["predictor"]
    predictor |= {"backbone": {"path": str(base)}, "window_length": 4}
    predictor["student"] = {"class_path": "ptp_lightning.models.FullCopyStudent"}
    saving = {"dirpath": str(tmp_path), "save_last": True, "save_top_k": 0, "every_n_train_steps": 2}
    config["trainer"] |= {"fast_dev_run": False, "max_steps": 2, "val_check_interval": 2, "logger": False}
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", "run.yaml"])
    main()
    return tmp_path / "last.ckpt"


def test_from_yaml_to_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in state} == {"student_copy", "slot_encoder"}
    predictor = ParallelTokenPredictor.from_pretrained(checkpoint)
    assert predictor.config.student == FullCopyStudent()

    texts: dict[str, list[int]] = {}
    for decoder in ("speculative", "autoregressive"):
        capsys.readouterr()
        arguments = ["--ckpt_path", str(checkpoint), "--prompt", "def", "--decoder", decoder, "--json"]
        monkeypatch.setattr(sys, "argv", ["ptp_lightning", "generate", *arguments])
        main()
        texts[decoder] = json.loads(capsys.readouterr().out)["token_ids"]
    assert texts["speculative"] == texts["autoregressive"] and len(texts["speculative"]) > 1

    with pytest.raises(ValueError, match="expected a predictor with an adapter, found FullCopyStudent"):
        predictor.save_pretrained(checkpoint.parent / "export")
