"""The byte-level tokenizer: round trips, determinism, and where it never merges across."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ptp_lightning.data.tokenizer import END_OF_TEXT, train_tokenizer
from ptp_lightning.utils.pretrained import load_tokenizer
from tests.helpers.tiny_data import Texts

SOURCE = "def add(left, right):\n    return left + right\n\n\ndef added(left):\n    return add(left, 1234567)\n"


@cache
def small() -> PreTrainedTokenizerFast:
    return train_tokenizer(Texts([SOURCE] * 3), vocab_size=270)


@cache
def embedded() -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer("embedded")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture(params=[small, embedded], ids=["small", "embedded"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))


class TestRoundTrip:
    @given(text=st.text(max_size=40))
    def test_any_text(self, text: str) -> None:
        for make in (small, embedded):
            assert round_trip(make(), text) == text

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "\n",
            "  \n\n\t x ,y .z !",
            "\r\n",
            "naïve café",
            "日本語 \U0001f600",
            "\0\x01",
            "e\u0301",
            "1234567",
        ],
    )
    def test_hard_texts(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        assert round_trip(tokenizer, text) == text

    def test_every_byte_has_an_entry(self, tokenizer: PreTrainedTokenizerFast) -> None:
        text = bytes(range(256)).decode("latin-1") + "".join(map(chr, range(0x800, 0x11000, 0x80)))
        text = text.encode(errors="ignore").decode()  # lone surrogates are no text
        assert round_trip(tokenizer, text) == text

        from tokenizers.pre_tokenizers import ByteLevel

        assert set(ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()


def test_end_of_text_is_id_0(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token == END_OF_TEXT and tokenizer.eos_token_id == 0
    assert tokenizer.decode([0]) == END_OF_TEXT


def test_vocabulary_sizes() -> None:
    assert len(small()) == 270
    assert len(embedded()) == 2048


def test_line_breaks_keep_their_indentation_and_words_their_blank() -> None:
    pieces = small().backend_tokenizer.pre_tokenizer.pre_tokenize_str(SOURCE[:50])
    assert [SOURCE[begin:end] for _, (begin, end) in pieces] == [
        *("def", " add", "(", "left", ",", " right", "):", "\n    ", "return", " left", " +", " right", "\n\n\n", "de"),
    ]


def test_same_corpus_same_tokenizer() -> None:
    again = train_tokenizer(Texts([SOURCE] * 3), vocab_size=270)
    assert again.backend_tokenizer.to_str() == small().backend_tokenizer.to_str()


def test_only_the_training_split_counts() -> None:
    other = train_tokenizer(Texts([SOURCE] * 3, held_out=["zzzz zzzz zzzz " * 50]), vocab_size=270)
    assert other.get_vocab() == small().get_vocab()


def test_folder_opens_again(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    opened = load_tokenizer(str(tmp_path))
    assert opened.encode(SOURCE) == small().encode(SOURCE)
    assert opened.eos_token_id == 0


@pytest.mark.parametrize("make_empty", [False, True])
def test_no_tokenizer_at_a_path(tmp_path: Path, make_empty: bool) -> None:
    folder = tmp_path / "model"
    if make_empty:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match="expected a"):
        load_tokenizer(str(folder))
