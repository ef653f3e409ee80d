"""Texts divided by cycles of calls: which tokens each wrote, and which of its drafts were wrong."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
from rich.text import Span

from ptp_lightning.decoding import Cycle, Generation, GenerationSettings, decode_speculatively, generate, generate_batch
from ptp_lightning.generation.call_marks import MarkedCycle, coloured, mark_cycles, plain_marks, print_marked
from ptp_lightning.generation.page import Section, html_page
from ptp_lightning.option_names import DecoderName
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_decoding import decode_one
from tests.helpers.tiny_predictors import tiny_predictor

TOKENIZER = byte_tokenizer()
PREDICTOR = tiny_predictor(vocab_size=257)
PROMPT_IDS = [5, 6, 7]
CYCLES = [MarkedCycle("a < b", " * c\\n", 3, 2), MarkedCycle(" & 3", "", 2, 2), MarkedCycle("\n", "", 1, 1)]
DECODERS: list[DecoderName] = ["autoregressive", "speculative", "speculative_lookup", "partial_quadratic"]


OPTIONS: Any = {"max_new_tokens": 40, "tokenizer": TOKENIZER, "window_length": 5, "end_of_text": ()}


def written(decoder: DecoderName) -> Generation:
    return generate(PREDICTOR, PROMPT_IDS, decoder=decoder, **OPTIONS)


@pytest.mark.parametrize("decoder", DECODERS)
def test_cycles_divide_tokens_and_calls(decoder: DecoderName) -> None:
    generation = written(decoder)
    assert sum(cycle.num_committed for cycle in generation.cycles) == generation.num_tokens
    assert sum(cycle.num_calls for cycle in generation.cycles) == generation.num_calls
    assert generation.num_tokens == 40


@pytest.mark.parametrize("decoder", DECODERS)
def test_rejected_tokens_are_the_rest_of_the_draft(decoder: DecoderName) -> None:
    generation = written(decoder)
    ends = accumulate(cycle.num_committed for cycle in generation.cycles)
    num_rejected = 0
    for end, cycle in zip(ends, generation.cycles, strict=True):
        assert len(cycle.rejected) in (0, cycle.num_drafted - cycle.num_correct)
        if cycle.rejected:
            assert cycle.rejected[0] != generation.token_ids[end - 1]  # the base model's pick in its place
            num_rejected += 1
    assert (num_rejected > 5) == (decoder != "autoregressive")


@pytest.mark.parametrize("decoder", ["speculative", "partial_quadratic"])
def test_texts_of_a_batch_have_the_cycles_of_their_own(decoder: DecoderName) -> None:
    prompts = [PROMPT_IDS, [9, 8, 7, 6]]
    options = OPTIONS | {"decoder": decoder, "max_new_tokens": 20}
    together = generate_batch(PREDICTOR, prompts, **options)
    for prompt, found in zip(prompts, together, strict=True):
        alone = generate(PREDICTOR, prompt, **options)
        pairs = list(zip(alone.cycles, found.cycles, strict=False))[:-3]  # windows of a batch shrink with the longest
        assert [cycle.rejected for cycle, _ in pairs] == [cycle.rejected for _, cycle in pairs]
        assert sum(cycle.num_committed for cycle in found.cycles) == found.num_tokens


def test_a_draft_beyond_the_end_of_the_text_is_not_wrong() -> None:
    settings = GenerationSettings(max_new_tokens=40, window_length=5)
    token_ids = decode_one(decode_speculatively, PREDICTOR, settings, PROMPT_IDS).token_ids
    ended = GenerationSettings(max_new_tokens=40, window_length=5, end_of_text=frozenset(token_ids[:1]))
    decoded = decode_one(decode_speculatively, PREDICTOR, ended, PROMPT_IDS)
    assert decoded.cycles == [Cycle(1, 2, 1, 5)]


@pytest.mark.parametrize("decoder", DECODERS)
def test_texts_of_cycles_add_up_to_the_text(decoder: DecoderName) -> None:
    generation = written(decoder)  # bytes that are mostly no characters
    cycles = mark_cycles(generation, PROMPT_IDS, TOKENIZER)
    assert "".join(cycle.text for cycle in cycles) == generation.text
    for marked, cycle in zip(cycles, generation.cycles, strict=True):
        has_special = TOKENIZER.eos_token_id in cycle.rejected  # which has no text
        assert bool(marked.rejected) == bool(cycle.rejected) or (has_special and not marked.rejected)


def test_a_character_belongs_to_the_cycle_that_completes_it_and_a_stop_string_to_none() -> None:
    ids: list[int] = TOKENIZER("aüb END", add_special_tokens=False).input_ids
    wrong: list[int] = TOKENIZER("\nx", add_special_tokens=False).input_ids
    cycles = [Cycle(2, 2, 1, 3, tuple(wrong)), Cycle(2, 2, 1, 2), Cycle(len(ids) - 4, 2, 3, 4)]
    generation = Generation(ids, 6, "stop", cycles, prompt="", text="aüb", seconds=1.0)
    assert [marked.text for marked in mark_cycles(generation, [], TOKENIZER)] == ["a", "üb", ""]
    (rejected,) = [marked.rejected for marked in mark_cycles(generation, [], TOKENIZER) if marked.rejected]
    assert rejected == "\\nx"


def test_plain_marks_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    print_marked("if ", CYCLES)
    assert capsys.readouterr().out == "if |a < b~~ * c\\n~~| & 3|\n|\n"


def test_colours_on_a_terminal_but_not_with_no_color(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_marked("[b]if ", CYCLES)
    printed = capsys.readouterr().out
    assert printed.startswith("[b]if \x1b[") and "a < b" in printed and "\x1b[9;" in printed and "|" not in printed
    monkeypatch.setenv("NO_COLOR", "1")
    print_marked("[b]if ", CYCLES)
    assert capsys.readouterr().out == f"[b]if |{plain_marks(CYCLES)}\n"


def test_neighbours_have_other_shades() -> None:
    spans: list[Span] = coloured(CYCLES).spans
    shades = [str(span.style) for span in spans if "strike" not in str(span.style)]
    assert len(shades) == 3 and all(first != second for first, second in pairwise(shades))
    assert sum("strike" in str(span.style) for span in spans) == 1


def test_the_page_is_escaped_and_stands_alone() -> None:
    page = html_page([Section("<script>", CYCLES, 'cost "1"'), Section("x", [], "none")])
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert 'title="cycle 1: 3 tokens in 2 calls">a &lt; b</span><del> * c\\n</del>' in page
    assert 'title="cycle 3: 1 token in 1 call">\n</span>' in page
    assert "http" not in page and page.count("<pre>") == 2 and '<meta charset="utf-8">' in page
