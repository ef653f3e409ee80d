"""An adapter on a sibling of its base model: the sibling's own texts, a warning, or one line that says what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from ptp_lightning.decoding import generate
from ptp_lightning.export.checkpoint import SETTINGS_FILE, load_network, save_network
from ptp_lightning.models import PredictorNetwork, SharedStudent
from ptp_lightning.models.students import Student
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.stored_predictors import trained
from tests.helpers.tiny_models import tiny_llama, tiny_qwen2

VOCABULARY = 257


def write_base(
    folder: Path, build: Callable[..., Any] = tiny_llama, change: float = 0.0, tokenizer: Any = None, **model: Any
) -> Path:
    """A model folder with a tokenizer of bytes, whose output head is larger by the factor `1 + change`."""
    made = build(**({"vocab_size": VOCABULARY} | model))
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(1 + change)
    made.save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("own"))


@pytest.fixture
def adapter(own_base: Path, tmp_path: Path) -> Path:
    save_network(trained(own_base), tmp_path / "adapter")
    return tmp_path / "adapter"


def text(predictor: PredictorNetwork, decoder: Any) -> list[int]:
    return generate(predictor, "def f", max_new_tokens=24, decoder=decoder, end_of_text=()).token_ids


def test_a_fine_tune_writes_its_own_texts(adapter: Path, own_base: Path, tmp_path: Path) -> None:
    fine_tune = write_base(tmp_path / "fine_tune", change=0.5)
    with pytest.warns(UserWarning, match=r"fine_tune \(fingerprint \w{12}\) is not .* \(\w{12}\): texts are its own"):
        predictor = load_network(adapter, base=fine_tune)
    assert predictor.config.backbone.path == str(fine_tune)
    expected = text(load_network(adapter), "autoregressive")
    assert text(predictor, "speculative") == text(predictor, "autoregressive") != expected


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"num_layers": 3}, "layers.2"), ({"hidden_size": 64}, r"\[.*64.*\]"), ({"build": tiny_qwen2}, None)],
)
def test_other_shapes_are_refused(adapter: Path, tmp_path: Path, changes: dict[str, Any], part: str | None) -> None:
    other = write_base(tmp_path / "other", **changes)
    if part is None:  # the adapter fits another family of the same sizes
        with pytest.warns(UserWarning, match="fewer tokens per call"):
            load_network(adapter, base=other)
        return
    with pytest.raises(ValueError, match=rf"^[^\n]*found .*other, for which [^\n]*{part}[^\n]*: set base$"):
        load_network(adapter, base=other)


def test_another_vocabulary_is_refused(adapter: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = state["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    tokenizer = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)), eos_token="<|endoftext|>"
    )
    other = write_base(tmp_path / "other", change=0.5, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"found that of .*other, whose vocabularies differ in 2 tokens \('a', 'b'\)"):
        load_network(adapter, base=other)


def test_another_split_is_refused(adapter: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    other = write_base(tmp_path / "other", change=0.5, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"found that of .*other, which splits \"Hello, world.*: set base"):
        load_network(adapter, base=other)


def test_a_tokenizer_that_is_gone_cannot_be_compared(adapter: Path, tmp_path: Path) -> None:
    about = json.loads((adapter / SETTINGS_FILE).read_text())
    about["config"]["backbone"]["path"] = str(tmp_path / "gone")
    (adapter / SETTINGS_FILE).write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="; the tokenizers could not be compared"):
        load_network(adapter, base=write_base(tmp_path / "other", change=0.5))


def test_a_missing_one_is_one_line(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^expected a model folder at .*nowhere, found nothing: set base$"):
        load_network(adapter, base=tmp_path / "nowhere")


def test_a_student_that_trained_its_base_model_has_no_sibling(own_base: Path, tmp_path: Path) -> None:
    student: Student = SharedStudent()
    predictor = trained(own_base, student=student, correction=None)
    state = {f"predictor.{name}": value for name, value in predictor.trainable_state().items()}
    about = {"config": predictor.config.to_dict(), "base_fingerprint": predictor.base_fingerprint}
    checkpoint = {"predictor": about | {"format_version": 2}, "state_dict": state, "global_step": 1}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    load_network(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="expected base for an adapter, found SharedStudent.*: leave base out"):
        load_network(tmp_path / "last.ckpt", base=own_base)
