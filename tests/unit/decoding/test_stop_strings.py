"""Stop strings: the text ends before the first of them, in every decoder and however the text comes in pieces."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptp_lightning.decoding import generate, generate_batch
from ptp_lightning.decoding.stop_strings import StopStrings
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_predictors import tiny_predictor

PREDICTOR = tiny_predictor(vocab_size=257, window_length=6)
TOKENIZER = byte_tokenizer()


def before_first(text: str, strings: list[str]) -> str:
    return text[: min((text.find(string) for string in strings if string in text), default=len(text))]


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_what_is_given_out_is_the_text_before_the_first_stop(pieces: list[str], strings: list[str]) -> None:
    stop = StopStrings(strings)
    given_out, read = "", ""
    for piece in pieces:
        given_out += stop.push(piece)
        read += piece
        assert before_first(read, strings).startswith(given_out)
        assert stop.found == any(string in read for string in strings)
        if stop.found:
            break
    # Stop strings that overlap: the one that is complete first decides.
    assert given_out + stop.flush() == before_first(read, strings)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["\n\n", "END"])
    assert [stop.push(piece) for piece in ("a\n", "b", "E", "N", "x", "\n", "\nc")] == [
        *("a", "\nb", "", "", "ENx", "", "")
    ]
    assert stop.found and stop.push("d") == "" and stop.flush() == ""


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative", "speculative_lookup", "partial_quadratic"])
def test_every_decoder_ends_at_the_same_token(decoder: str) -> None:
    options = {"max_new_tokens": 40, "end_of_text": (), "tokenizer": TOKENIZER}
    full = generate(PREDICTOR, "def ", decoder="autoregressive", **options)
    ends = set()
    for token_id in full.token_ids[2:]:
        string = TOKENIZER.decode([token_id])
        if "\ufffd" in string:  # no whole character
            continue
        streamed: list[str] = []
        tokens: list[int] = []
        found = generate(
            PREDICTOR,
            "def ",
            decoder=decoder,
            stop=[string],
            on_text=streamed.append,
            on_tokens=tokens.extend,
            **options,
        )
        assert found.text == "".join(streamed) == before_first(full.text, [string])
        assert found.token_ids == tokens == full.token_ids[: len(tokens)]
        assert found.finish_reason == "stop"
        assert string in TOKENIZER.decode(tokens) and string not in TOKENIZER.decode(tokens[:-1])
        ends.add(len(tokens))
    assert len(ends) > 3


def test_one_text_of_a_batch_stops_and_the_others_go_on() -> None:
    options = {"max_new_tokens": 20, "end_of_text": (), "tokenizer": TOKENIZER, "seed": (0, 1)}
    full = generate_batch(PREDICTOR, ["def ", "class"], **options)
    string = next(letter for letter in full[0].text[1:12] if letter != "\ufffd" and letter not in full[1].text)
    stopped, other = generate_batch(PREDICTOR, ["def ", "class"], stop=[string], **options)
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) < 20
    assert (other.token_ids, other.finish_reason) == (full[1].token_ids, "length")


def test_one_string_is_one_stop_string() -> None:
    """Not the letters of which it consists."""
    options = {"max_new_tokens": 20, "end_of_text": (), "tokenizer": TOKENIZER}
    full = generate(PREDICTOR, "def ", **options)
    string = next(pair for pair in zip(full.text[2:], full.text[3:], strict=False) if "\ufffd" not in pair)
    found = generate(PREDICTOR, "def ", stop="".join(string), **options)
    assert found == replace(generate(PREDICTOR, "def ", stop=["".join(string)], **options), seconds=found.seconds)
    assert found.text == before_first(full.text, ["".join(string)])
    assert StopStrings("END").push("EN") == ""


@pytest.mark.parametrize("stop", [["a", ""], "", [5], [None]], ids=str)
def test_what_is_no_stop_string_is_refused(stop: Any) -> None:
    with pytest.raises(ValueError, match="at least one character"):
        generate(PREDICTOR, "def ", stop=stop, tokenizer=TOKENIZER)
