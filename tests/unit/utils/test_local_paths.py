"""Addresses in place of files, wherever a user names a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ptp_lightning.data import PickUps, TextFiles
from ptp_lightning.data.completions.completions import CompletionFolder
from ptp_lightning.evaluation.questions import read_questions
from ptp_lightning.evaluation.records import RecordFile
from ptp_lightning.export.checkpoint import require_free_folder
from ptp_lightning.export.stored_predictor import read_predictor
from ptp_lightning.pregeneration.prompt_files import read_prompt_texts
from ptp_lightning.pregeneration.topics import read_topics
from ptp_lightning.utils.local_paths import local_folder, local_path
from ptp_lightning.utils.named_files import find_yaml
from ptp_lightning.utils.pretrained import load_tokenizer
from ptp_lightning.utils.text_files import read_lines

TAKES_A_PATH: dict[str, Callable[[str], object]] = {
    "data.corpus.paths": lambda given: TextFiles([given]),
    "data.series.path": PickUps,
    "data.folder": CompletionFolder.open,
    "data.tokenizer": load_tokenizer,
    "--questions": lambda given: read_questions("humaneval", given),
    "--prompts": lambda given: read_lines(given, "one prompt per line", "--prompts"),
    "--prompts ": lambda given: read_prompt_texts([f"{given}:prompt"]),
    "--topics": read_topics,
    "ckpt_path": read_predictor,
    "--config": lambda given: find_yaml(given, "configs"),
    "the study": lambda given: find_yaml(given, "sweeps"),
    "--output": lambda given: RecordFile(given, {}),
    "output": require_free_folder,
}


@pytest.mark.parametrize("key", TAKES_A_PATH)
@pytest.mark.parametrize("address", ["https://example.org/a/b.jsonl", "hf://datasets/a/b", "s3://bucket/a"])
def test_an_address_is_refused_in_one_line(
    key: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = f"^expected a path, found the address {address}(:prompt)?: [^\n]* {key.strip()}$"
    with pytest.raises(ValueError, match=message):
        TAKES_A_PATH[key](address)
    assert list(tmp_path.iterdir()) == []  # no folder "https:"


def test_a_path_that_pathlib_has_shortened() -> None:
    with pytest.raises(ValueError, match="found the address https://example.org/a:"):
        local_path(Path("https://example.org/a"), "--html")


def test_a_file_of_such_a_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run:").mkdir()
    assert local_path("run:/", "--output") == Path("run:")


def test_a_user_that_does_not_exist() -> None:
    assert local_path("~nobody-of-this-name/a", "--prompts") == Path("~nobody-of-this-name/a")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for given in ("file", "file/folder"):
        with pytest.raises(ValueError, match=rf"^expected a folder, found the file {tmp_path}/file: set --output$"):
            local_folder(tmp_path / given, "--output")
    assert local_folder(tmp_path / "new" / "folder", "--output") == tmp_path / "new" / "folder"
