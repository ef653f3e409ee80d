"""From text to text: what is streamed is what is returned, in whole characters, with either decoder."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ptp_lightning.decoding import Generation, generate, generate_batch
from ptp_lightning.decoding.text import INCOMPLETE, IncrementalDetokenizer, end_of_text_ids
from ptp_lightning.models import BackboneSettings, PredictorConfig
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.predictor import ParallelTokenPredictor
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.byte_tokenizer import END_OF_TEXT_ID, byte_tokenizer
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_predictors import tiny_predictor

TOKENIZER = byte_tokenizer()


@cache
def small() -> PredictorNetwork:
    return tiny_predictor(vocab_size=257, sampling=SamplingConfig(temperature=0.7), eos_token_id=None)


def continue_text(prompt: str | list[int] = "def ", **options: Any) -> Generation:
    return generate(small(), prompt, **({"tokenizer": TOKENIZER, "max_new_tokens": 20} | options))


class TestGenerate:
    def test_threads_that_share_a_predictor_get_their_own_texts(self) -> None:
        """With every decoder; gate and caches are states of the network."""
        predictor = ParallelTokenPredictor(small())
        jobs: list[tuple[int, Any]] = [
            (seed, decoder) for seed in range(3) for decoder in ("speculative_lookup", "lookup", "partial_quadratic")
        ]

        def text(job: tuple[int, Any]) -> list[int]:
            seed, decoder = job
            options: dict[str, Any] = {"max_new_tokens": 20, "tokenizer": TOKENIZER}
            return predictor.generate("def ", seed=seed, decoder=decoder, **options).token_ids

        expected = [text(job) for job in jobs]
        with ThreadPoolExecutor(max_workers=4) as pool:
            assert list(pool.map(text, 2 * jobs)) == 2 * expected
        assert len({tuple(one) for one in expected}) == 3

    def test_decoders_give_the_same_text(self) -> None:
        for seed in range(5):
            fast, reference = (continue_text(seed=seed, decoder=name) for name in ("speculative", "autoregressive"))
            assert fast.token_ids == reference.token_ids
            assert fast.text == reference.text
            assert reference.accepted_per_call == 1
            # Two calls commit two tokens at least, or one where the text ends.
            assert fast.num_calls <= fast.num_tokens + (fast.finish_reason == "eos")

    def test_the_method_of_the_predictor_is_the_same(self) -> None:
        method = ParallelTokenPredictor(small()).generate("def ", tokenizer=TOKENIZER, max_new_tokens=20, seed=2)
        assert method.token_ids == continue_text(seed=2).token_ids

    def test_a_predictor_loads_its_tokenizer_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded: list[PredictorNetwork] = []
        monkeypatch.setattr("ptp_lightning.predictor.tokenizer_of", lambda one: loaded.append(one) or TOKENIZER)
        predictor = ParallelTokenPredictor(small())
        texts = [predictor.generate("def ", max_new_tokens=4).text for _ in range(2)]
        assert len(loaded) == 1 and len(set(texts)) == 1

    def test_result(self) -> None:
        result = continue_text()
        assert (result.prompt, result.num_tokens, result.finish_reason) == ("def ", 20, "length")
        assert result.text == TOKENIZER.decode(result.token_ids)
        assert result.accepted_per_call == 20 / result.num_calls
        assert result.seconds > 0

    @pytest.mark.parametrize("code", [0xDCFF, 0xD800], ids=["byte", "surrogate"])
    def test_prompts_that_are_no_unicode_text(self, code: int) -> None:
        """A byte of the command line that is not UTF-8, and half of a pair in a JSON file."""
        prompt = f"a {chr(code)}"
        with pytest.raises(ValueError, match=r"^expected Unicode text, found [^\n]*: write it in UTF-8$"):
            continue_text(prompt)

    def test_a_relative_path_is_that_of_the_folder_in_which_it_was_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = tmp_path / "base"
        tiny_llama(vocab_size=257).save_pretrained(base)
        TOKENIZER.save_pretrained(base)
        monkeypatch.chdir(tmp_path)
        network = PredictorNetwork(PredictorConfig(BackboneSettings("base"), window_length=4))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        assert generate(network, "def ", max_new_tokens=2).num_tokens == 2

    def test_streams_add_up_to_the_result(self) -> None:
        tokens: list[int] = []
        pieces: list[str] = []
        result = continue_text(on_tokens=tokens.extend, on_text=pieces.append)
        assert tokens == result.token_ids
        assert "".join(pieces) == result.text
        assert len(pieces) > 1 and all(pieces)

    def test_token_ids_are_a_prompt_as_well(self) -> None:
        result = continue_text(TOKENIZER.encode("def "))
        assert (result.prompt, result.token_ids) == ("def ", continue_text().token_ids)

    @pytest.mark.parametrize("convert", [torch.tensor, np.array, tuple], ids=["torch", "numpy", "tuple"])
    def test_token_ids_of_other_libraries(self, convert: Callable[[list[int]], Any]) -> None:
        received: list[int] = []
        result = continue_text(convert(TOKENIZER.encode("def ")), on_tokens=received.extend)
        assert (result.prompt, result.token_ids) == ("def ", continue_text().token_ids)
        end = result.token_ids[7]
        ended = continue_text(end_of_text=convert([end]))
        assert ended.token_ids == result.token_ids[: result.token_ids.index(end) + 1]
        assert {type(token_id) for token_id in (*received, *ended.token_ids)} == {int}

    @pytest.mark.parametrize("given", [torch.tensor([[5, 6]]), torch.tensor([[5]]), [5.0], [True], 5, torch.tensor(5)])
    def test_no_token_ids_are_refused_in_one_line(self, given: Any) -> None:
        refused = r"^expected (an integer|several integers), found [^\n]+: set"
        with pytest.raises(ValueError, match=rf"{refused} prompt$"):
            continue_text(given)
        with pytest.raises(ValueError, match=rf"{refused} end_of_text$"):
            continue_text(end_of_text=given)

    def test_sampling_settings_are_those_of_the_adapter_unless_given(self) -> None:
        own = continue_text(seed=1).token_ids
        assert own == continue_text(seed=1, sampling=SamplingConfig(temperature=0.7)).token_ids
        assert own != continue_text(seed=1, sampling=SamplingConfig(temperature=2.0)).token_ids

    def test_end_of_text_ends_the_text_and_is_no_text(self) -> None:
        open_ended = continue_text()
        end = open_ended.token_ids[7]
        result = continue_text(end_of_text=[end])
        assert result.token_ids == open_ended.token_ids[: open_ended.token_ids.index(end) + 1]
        assert result.finish_reason == "eos"
        detokenizer = IncrementalDetokenizer(TOKENIZER, [1])
        assert detokenizer.push([*TOKENIZER.encode("a"), END_OF_TEXT_ID]) + detokenizer.flush() == "a"

    def test_ends_of_text_come_from_model_and_tokenizer(self) -> None:
        assert end_of_text_ids(small(), TOKENIZER) == {END_OF_TEXT_ID}
        predictor = tiny_predictor(vocab_size=257, eos_token_id=[3, 5])
        assert end_of_text_ids(predictor, TOKENIZER) == {END_OF_TEXT_ID, 3, 5}

    def test_dropout_is_off_while_decoding(self) -> None:
        predictor = tiny_predictor("gpt2", vocab_size=257)  # its default configuration drops a tenth
        expected = generate(predictor, "def ", tokenizer=TOKENIZER).token_ids
        predictor.slot_encoder.train()
        predictor.language_model.train()
        assert generate(predictor, "def ", tokenizer=TOKENIZER).token_ids == expected
        assert predictor.slot_encoder.training and predictor.base_model.training and not predictor.training

    @pytest.mark.parametrize(
        ("prompt", "options", "message"),
        [
            ("", {}, "prompt of at least one token"),
            ([], {}, "prompt of at least one token"),
            ([5, 257], {}, "0 .. 256 .* found 257"),
            ("x" * 250, {}, "max_new_tokens <= 256"),
            ("x", {"max_new_tokens": 0}, "max_new_tokens >= 1"),
            ("x", {"window_length": 0}, "window_length >= 2"),
            (
                "x",
                {"decoder": "magic"},
                "speculative_lookup, lookup, partial_quadratic, found 'magic'",
            ),
        ],
    )
    def test_bad_input_is_named(self, prompt: str | list[int], options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            continue_text(prompt, **options)

    @pytest.mark.parametrize(
        "options",
        [
            *({"max_new_tokens": value} for value in (2.5, "5", True, None)),
            *({"seed": value} for value in (3.0, None, "5", (1.5,))),
            *({name: 2.5} for name in ("window_length", "slot_budget", "num_draft_tokens")),
            *({"sampling": value} for value in ({}, {"temperature": 0.5}, 0)),
        ],
        ids=str,
    )
    def test_values_of_another_type_are_named(self, options: dict[str, Any]) -> None:
        (name,) = options
        with pytest.raises(ValueError, match=rf"^expected an? (integer|SamplingConfig), found [^\n]+: set {name}$"):
            continue_text(**options)

    def test_integers_of_other_libraries(self) -> None:
        given = {"seed": np.int64(3), "max_new_tokens": torch.tensor(20), "window_length": np.int32(6)}
        assert continue_text(**given).token_ids == continue_text(seed=3, window_length=6).token_ids

    def test_an_unknown_option_is_named(self) -> None:
        with pytest.raises(TypeError, match="expected options among max_new_tokens, .*, found temperature"):
            continue_text(temperature=0.5)

    def test_a_batch_gives_each_prompt_its_text(self) -> None:
        prompts = ["def ", "x", "class "]
        streamed = ["", "", ""]

        def write(row: int, piece: str) -> None:
            streamed[row] += piece

        found = generate_batch(small(), prompts, tokenizer=TOKENIZER, max_new_tokens=20, seed=(1, 2, 1), on_text=write)
        alone = [continue_text(prompt, seed=seed) for prompt, seed in zip(prompts, (1, 2, 1), strict=True)]
        assert [text.text for text in found] == [text.text for text in alone] == streamed
        assert [text.prompt for text in found] == prompts


def pushed(detokenizer: IncrementalDetokenizer, token_ids: list[int], at_once: int) -> list[str]:
    return [detokenizer.push(token_ids[k : k + at_once]) for k in range(0, len(token_ids), at_once)]


class TestIncrementalDetokenizer:
    @pytest.mark.parametrize("at_once", [1, 2, 3, 5])
    def test_characters_are_whole(self, at_once: int) -> None:
        text = "é€😀a\n  ñ"
        detokenizer = IncrementalDetokenizer(TOKENIZER, TOKENIZER.encode("x"))
        pieces = pushed(detokenizer, TOKENIZER.encode(text), at_once)
        assert INCOMPLETE not in "".join(pieces)
        assert "".join(pieces) == text
        assert detokenizer.flush() == ""

    def test_a_character_is_written_with_its_last_byte(self) -> None:
        pieces = pushed(IncrementalDetokenizer(TOKENIZER, [1]), TOKENIZER.encode("a😀b"), 1)
        assert pieces == ["a", "", "", "", "😀", "b"]

    def test_an_unfinished_character_shows_at_the_end(self) -> None:
        detokenizer = IncrementalDetokenizer(TOKENIZER, [1])
        assert pushed(detokenizer, TOKENIZER.encode("a😀")[:-1], 1) == ["a", "", "", ""]
        assert detokenizer.flush() == INCOMPLETE

    @given(st.lists(st.integers(0, 256), min_size=1, max_size=30), st.integers(1, 4))
    def test_pieces_add_up_to_the_decoded_text(self, token_ids: list[int], at_once: int) -> None:
        detokenizer = IncrementalDetokenizer(TOKENIZER, TOKENIZER.encode("x"))
        pieces = [*pushed(detokenizer, token_ids, at_once), detokenizer.flush()]
        assert "".join(pieces) == TOKENIZER.decode(token_ids, skip_special_tokens=True)

    def test_the_blank_between_prompt_and_text_stays(self) -> None:
        """Tokenizers with blanks in front of words drop the first blank of what they decode."""
        words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "?": 2}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Metaspace()
        words.decoder = decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        assert tokenizer.decode([1]) == "cat"
        assert IncrementalDetokenizer(tokenizer, [0]).push([1]) == " cat"
