"""What tests of models share."""

from pathlib import Path

import pytest

from tests.helpers.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path
