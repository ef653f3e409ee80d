"""Which paths are local, what is said when nothing fits, and tokenizers with and without an end of text."""

from pathlib import Path

import pytest

from ptp_lightning.utils.pretrained import embedded_folder, few, listing, load_tokenizer, locate
from tests.helpers.tiny_data import tiny_tokenizer


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("network used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


LOCAL = {"local_files_only": True, "trust_remote_code": False}


class TestLocate:
    def test_embedded(self) -> None:
        found = locate("embedded")
        assert found == {"pretrained_model_name_or_path": str(embedded_folder())} | LOCAL
        assert embedded_folder().parts[-3:] == ("ptp_lightning", "assets", "embedded_teacher")
        assert (embedded_folder() / "tokenizer.json").is_file()

    def test_addresses(self) -> None:
        with pytest.raises(ValueError, match=r"found the address http://x\.y/z: .* set data\.tokenizer"):
            load_tokenizer("http://x.y/z")

    def test_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder.parent)
        monkeypatch.setenv("HOME", str(folder.parent))
        for path, opened in ((str(folder), str(folder)), ("model", "model"), ("~/model", str(folder))):
            assert locate(path, revision="v1") == {"pretrained_model_name_or_path": opened} | LOCAL

    @pytest.mark.parametrize("name", ["model.gguf", "model.bin"])
    def test_gguf_is_known_by_its_content(self, tmp_path: Path, name: str) -> None:
        pytest.importorskip("gguf")
        (tmp_path / name).write_bytes(b"GGUF\x03")
        assert locate(str(tmp_path / name)) == {
            "pretrained_model_name_or_path": str(tmp_path),
            "gguf_file": name,
            **LOCAL,
        }

    @pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "last.ckpt"])
    def test_a_file_of_another_kind_is_not_nothing(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"PK\x03\x04 something else")
        with pytest.raises(ValueError, match=rf"GGUF file, found that .*{name} starts with b'PK.*data\.tokenizer"):
            locate(str(tmp_path / name), key="data.tokenizer")

    @pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
    def test_local_path_to_nothing(self, path: str) -> None:
        with pytest.raises(FileNotFoundError, match=r"model folder at .*found nothing: set predictor\.backbone\.path"):
            locate(path)

    @pytest.mark.parametrize("path", ["nowhere.gguf", "someone/nowhere.gguf"])
    def test_gguf_file_that_is_not_there(self, path: str) -> None:
        with pytest.raises(FileNotFoundError, match="expected a GGUF file at .*found nothing"):
            locate(path)

    @pytest.mark.parametrize("path", ["gpt2", "someone/model"])
    def test_hub_id(self, path: str) -> None:
        expected = {"pretrained_model_name_or_path": path, "revision": "v1", "trust_remote_code": False}
        assert locate(path, revision="v1") == expected

    def test_package_for_gguf_is_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF\x03")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"backbone\.path=.*pip install 'ptp_lightning\[gguf\]'"):
            locate(str(tmp_path / "model.gguf"))


class TestTokenizer:
    def test_folder(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.encode("abc") == [1, 2, 3]
        assert tokenizer.eos_token_id == 0
        assert capfd.readouterr() == ("", "")

    def test_end_of_text_is_not_required(self, tmp_path: Path) -> None:
        tiny_tokenizer(end_of_text=False).save_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path)).eos_token_id is None

    def test_folder_without_one(self, folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        (folder / "config.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match=r"a tokenizer in .*found config\.json: set data\.tokenizer"):
            load_tokenizer(str(folder))

    def test_broken_one(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"version"')
        with pytest.raises(ValueError, match=r"^predictor\.backbone\.path=.*model cannot be read: [^\n]*$"):
            load_tokenizer(str(folder), key="predictor.backbone.path")

    def test_unreachable_hub_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"data\.tokenizer=nobody/nothing cannot be read"):
            load_tokenizer("nobody/nothing")


def test_lists_stay_short(tmp_path: Path) -> None:
    assert few("cab") == "a, b, c"
    assert few("fabcde") == "a, b, c, d and 2 more"
    assert listing(tmp_path) == "an empty folder"
