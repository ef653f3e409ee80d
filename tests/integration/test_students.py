"""Students that are whole networks, from YAML to text: `generate` gives what the base model samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ptp_lightning.cli import main
from ptp_lightning.export.checkpoint import load_network, save_network
from tests.helpers.tiny_configs import CORPUS_LINE, shrink
from tests.helpers.tiny_data import tiny_tokenizer
from tests.helpers.tiny_models import tiny_llama

CONFIG = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"
TEACHER_FREE: dict[str, Any] = {
    "class_path": "ptp_lightning.training.InverseAutoregressiveModule",
    "init_args": {
        "predictor": {},
        "autoregressive_loss_weight": 0.5,
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    },
}


def fit(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps by command line; gives the checkpoint."""
    saving = {"dirpath": str(folder), "save_last": True, "save_top_k": 0, "every_n_train_steps": 2}
    config["trainer"] |= {"fast_dev_run": False, "max_steps": 2, "val_check_interval": 2, "logger": False}
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    ]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", "run.yaml"])
    main()
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("student", "network"), [("FullCopyStudent", "student_copy"), ("SharedStudent", "language_model")]
)
def test_from_yaml_to_text(
    student: str, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, corpus = tmp_path / "base", tmp_path / "corpus.txt"
    tiny_llama(vocab_size=64).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    corpus.write_text(CORPUS_LINE * 400)
    config = yaml.safe_load(shrink(CONFIG, corpus, tmp_path).read_text())
    if student == "SharedStudent":
        config["model"] = TEACHER_FREE
    config["model"]["init_args"]["predictor"] |= {
        "backbone": {"path": str(base)},
        "student": {"class_path": f"ptp_lightning.models.{student}"},
        "window_length": 4,
    }
    config["data"]["init_args"]["tokenizer"] = str(base)
    checkpoint = fit(config, tmp_path, monkeypatch)

    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in state} == {network, "slot_encoder"}
    predictor = load_network(checkpoint)
    assert type(predictor.config.student).__name__ == student

    texts: dict[str, list[int]] = {}
    for decoder in ("speculative", "autoregressive"):
        capsys.readouterr()
        arguments = ["--ckpt_path", str(checkpoint), "--prompt", "def", "--decoder", decoder, "--json"]
        monkeypatch.setattr(sys, "argv", ["ptp_lightning", "generate", *arguments])
        main()
        texts[decoder] = json.loads(capsys.readouterr().out)["token_ids"]
    assert texts["speculative"] == texts["autoregressive"] and len(texts["speculative"]) > 1

    with pytest.raises(ValueError, match=f"expected a predictor with an adapter, found {student}"):
        save_network(predictor, tmp_path / "export")
