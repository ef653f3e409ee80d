"""Users of transformers: `custom_generate` on a loaded predictor, and a folder that brings its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from operator import ne
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
)

from ptp_lightning.decoding import generate, generate_with_predictor
from ptp_lightning.decoding.transformers_generate import CustomGenerate
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.export.model_folder import GENERATE_FILE, save_with_base_model
from ptp_lightning.export.stored_predictor import CARD_FILE, EXPORTED_FILES, PREDICTOR_FOLDER
from ptp_lightning.models import PredictorNetwork
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.stored_predictors import trained
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_predictors import sharpen

PROMPT = torch.tensor([[50, 51, 52, 53]])
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
SAMPLING = SamplingConfig(temperature=0.7, top_k=5, top_p=0.9)
CALL_IN_A_FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = model.generate(torch.tensor([[50, 51, 52, 53]]), max_new_tokens=12, do_sample=True, temperature=0.7, top_k=5,
                     top_p=0.9, seed=3, eos_token_id=None)
print(ids[0].tolist())
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = tiny_llama(vocab_size=257)
    sharpen(model, 2.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(base: Path) -> PredictorNetwork:
    return trained(base)


@pytest.fixture(scope="module")
def folder(predictor: PredictorNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "whole"
    save_with_base_model(predictor, folder)
    return folder


def expected(
    predictor: PredictorNetwork, seed: int, sampling: SamplingConfig = SAMPLING, max_new_tokens: int = 12
) -> list[int]:
    """Our autoregressive decoder's text."""
    return generate(
        predictor,
        PROMPT[0].tolist(),
        decoder="autoregressive",
        seed=seed,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        end_of_text=(),
        tokenizer=byte_tokenizer(),
    ).token_ids


class Received:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.token_ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def call(predictor: PredictorNetwork, input_ids: Tensor = PROMPT, **options: Any) -> list[list[int]]:
    model: Any = predictor.base_model
    defaults = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "seed": 3}
    return model.generate(input_ids, custom_generate=CustomGenerate(predictor), **(defaults | options)).tolist()


class TestCustomGenerate:
    @pytest.mark.parametrize("decoder", ["speculative", "partial_quadratic", "autoregressive"])
    def test_gives_our_text(self, decoder: str, predictor: PredictorNetwork) -> None:
        assert call(predictor, decoder=decoder, **SAMPLED) == [PROMPT[0].tolist() + expected(predictor, 3)]

    def test_greedy_is_what_generate_gives_without_it(self, predictor: PredictorNetwork) -> None:
        model: Any = predictor.base_model
        plain = model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()
        assert call(predictor, do_sample=False) == plain

    @pytest.mark.parametrize("decoder", ["speculative", "partial_quadratic", "autoregressive"])
    def test_penalties(self, decoder: str, predictor: PredictorNetwork) -> None:
        """Given as arguments or as a processor; over each prompt without its padding."""
        model: Any = predictor.base_model
        padded = torch.tensor([[0, 0, *PROMPT[0].tolist()], [60, 61, 60, 61, 60, 62]])
        options = {"attention_mask": (padded > 0).long(), "eos_token_id": None, "pad_token_id": 0}
        penalties = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
        plain = model.generate(padded, max_new_tokens=12, do_sample=False, **penalties, **options).tolist()
        free = model.generate(padded, max_new_tokens=12, do_sample=False, **options).tolist()
        assert all(map(ne, plain, free))
        assert call(predictor, padded, do_sample=False, decoder=decoder, **penalties, **options) == plain
        sampling = replace(SAMPLING, min_p=0.1, **penalties)
        text = expected(predictor, 3, sampling)
        assert call(predictor, decoder=decoder, min_p=0.1, **penalties, **SAMPLED) == [PROMPT[0].tolist() + text]
        processor = RepetitionPenaltyLogitsProcessor(1.5)
        given = call(predictor, logits_processor=[processor], no_repeat_ngram_size=2, min_p=0.1, **SAMPLED)
        assert given == [PROMPT[0].tolist() + text]

    def test_prompts_of_a_batch_are_padded_on_the_left(self, predictor: PredictorNetwork) -> None:
        padded = torch.tensor([[0, 0, *PROMPT[0].tolist()], [60, 61, 62, 63, 64, 65]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        first, second = call(predictor, padded, attention_mask=mask, **SAMPLED)
        assert first == padded[0].tolist() + expected(predictor, 3)
        assert second[:6] == padded[1].tolist() and len(second) == 18

    def test_torch_draws_the_seed_where_none_is_given(self, predictor: PredictorNetwork) -> None:
        texts = []
        for manual_seed in (1, 2, 1):
            torch.manual_seed(manual_seed)
            texts.append(call(predictor, seed=None, **SAMPLED))
        assert texts[0] == texts[2] != texts[1]

    def test_ends_at_the_end_of_text_and_fills_up(self, predictor: PredictorNetwork) -> None:
        text = expected(predictor, 3)
        place = next(k for k in range(2, 12) if text[k] not in text[:k])
        assert call(predictor, eos_token_id=text[place], **SAMPLED) == [PROMPT[0].tolist() + text[: place + 1]]
        both = call(predictor, PROMPT.expand(2, -1), eos_token_id=text[place], pad_token_id=7, **SAMPLED)
        assert both[0][: 4 + place + 1] == PROMPT[0].tolist() + text[: place + 1]
        assert set(both[0][4 + place + 1 :]) <= {7} and len(both[0]) == len(both[1])

    def test_stopping_criteria_are_asked_after_every_token(self, predictor: PredictorNetwork) -> None:
        lengths: list[int] = []

        def criterion(input_ids: Tensor, scores: object, **_: object) -> Tensor:
            lengths.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] == 9])

        found = call(predictor, stopping_criteria=[criterion], **SAMPLED)
        assert found == [PROMPT[0].tolist() + expected(predictor, 3)[:5]]
        assert lengths == [5, 6, 7, 8, 9]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (
                {"suppress_tokens": [7]},
                "but temperature, .*, found SuppressTokensLogitsProcessor",
            ),
            ({"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5, 2)]}, "of a part of it"),
            ({"logits_processor": [TemperatureLogitsWarper(0.5)]}, "for temperature, found two"),
            ({"min_new_tokens": 3, "eos_token_id": 9}, "found MinLengthLogitsProcessor"),
            ({"num_return_sequences": 2}, "expected num_return_sequences=1"),
            ({"return_dict_in_generate": True}, "expected return_dict_in_generate=False"),
            ({"decoder": "fast"}, "expected decoder to be one of autoregressive"),
        ],
    )
    def test_what_it_cannot_do_is_refused(
        self, options: dict[str, Any], reason: str, predictor: PredictorNetwork
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            call(predictor, **(SAMPLED | options))

    def test_a_streamer_gets_the_prompt_and_each_token_and_the_end(self, predictor: PredictorNetwork) -> None:
        streamer = Received()
        (text,) = call(predictor, streamer=streamer, **SAMPLED)
        assert streamer.token_ids == text
        assert streamer.ended == 1

    def test_a_reader_of_the_stream_does_not_wait_for_ever(self, predictor: PredictorNetwork) -> None:
        streamer = TextIteratorStreamer(byte_tokenizer(), skip_prompt=True, timeout=20)  # pyright: ignore[reportArgumentType]
        thread = threading.Thread(target=lambda: call(predictor, streamer=streamer, **SAMPLED))
        thread.start()
        assert "".join(streamer) == byte_tokenizer().decode(expected(predictor, 3))
        thread.join()

    def test_a_stream_ends_with_an_error_too(self, predictor: PredictorNetwork) -> None:
        streamer = Received()
        with pytest.raises(ValueError, match="expected window_length"):
            call(predictor, streamer=streamer, window_length=1, **SAMPLED)
        assert streamer.ended == 1

    def test_ends_where_the_base_model_has_no_positions_left(
        self, predictor: PredictorNetwork, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PredictorNetwork, "max_positions", PROMPT.shape[1] + 5)
        with pytest.warns(UserWarning, match=r"found 4 \+ 12: the text ends after 5 tokens"):
            assert call(predictor, **SAMPLED) == [PROMPT[0].tolist() + expected(predictor, 3, max_new_tokens=5)]

    def test_a_streamer_takes_one_text(self, predictor: PredictorNetwork) -> None:
        with pytest.raises(ValueError, match="expected a single prompt with a streamer, found 2"):
            call(predictor, PROMPT.expand(2, -1), streamer=Received(), **SAMPLED)

    def test_stop_strings(self, predictor: PredictorNetwork) -> None:
        text = expected(predictor, 3)
        position = next(k for k in range(2, 12) if byte_tokenizer().decode([text[k]]).isascii())
        stop = byte_tokenizer().decode([text[position]])
        (found,) = generate_with_predictor(
            predictor,
            PROMPT,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=0,
            seed=3,
            stop_strings=[stop],
            tokenizer=byte_tokenizer(),
            **SAMPLED,
        ).tolist()
        assert found == PROMPT[0].tolist() + text[: text.index(text[position]) + 1]

    def test_stop_strings_of_the_callable(self, predictor: PredictorNetwork) -> None:
        """In place of `generate_with_predictor`; transformers keeps the tokenizer of `generate` to itself."""
        text = expected(predictor, 3)
        model: Any = predictor.base_model
        position = next(k for k in range(2, 12) if byte_tokenizer().decode([text[k]]).isascii())
        stop = byte_tokenizer().decode([text[position]])
        options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "seed": 3, "stop_strings": [stop]}
        ours = CustomGenerate(predictor, byte_tokenizer())
        found = model.generate(PROMPT, custom_generate=ours, **options, **SAMPLED)
        assert found[0].tolist() == PROMPT[0].tolist() + text[: text.index(text[position]) + 1]
        with pytest.raises(ValueError, match=r"stop_strings, found none: call CustomGenerate.predictor, tokenizer."):
            model.generate(PROMPT, custom_generate=CustomGenerate(predictor), **options, **SAMPLED)

    def test_stop_strings_need_a_tokenizer(self, predictor: PredictorNetwork) -> None:
        with pytest.raises(ValueError, match="set tokenizer"):
            generate_with_predictor(predictor, PROMPT, stop_strings=["a"])

    def test_several_threads_get_their_own_texts(self, predictor: PredictorNetwork) -> None:
        wanted = {seed: expected(predictor, seed) for seed in range(3)}
        found: list[bool] = []

        def job(seed: int) -> None:
            for _ in range(3):
                found.append(call(predictor, seed=seed, **SAMPLED)[0][4:] == wanted[seed])

        threads = [threading.Thread(target=job, args=(seed,)) for seed in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 9

    def test_another_model_is_refused(self, predictor: PredictorNetwork) -> None:
        model: Any = tiny_llama(vocab_size=257)
        with pytest.raises(ValueError, match=r"call predictor\.base_model\.generate"):
            model.generate(PROMPT, custom_generate=CustomGenerate(predictor), max_new_tokens=3)


class TestFolder:
    def test_holds_a_model_and_a_predictor(self, folder: Path) -> None:
        names = {path.name for path in folder.iterdir()}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json", PREDICTOR_FOLDER, "custom_generate"}
        assert {path.name for path in (folder / PREDICTOR_FOLDER).iterdir()} == set(EXPORTED_FILES)

    def test_can_be_read_by_others(self, folder: Path) -> None:
        assert len({file.stat().st_mode for file in folder.rglob("*") if file.is_file()}) == 1

    def test_weights_are_those_of_the_base_model(self, folder: Path, base: Path) -> None:
        plain, exported = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (base, folder))
        assert plain.keys() == exported.keys()
        assert all(torch.equal(plain[name], exported[name]) for name in plain)

    def test_generates_by_itself_in_a_fresh_process(self, folder: Path, predictor: PredictorNetwork) -> None:
        """From another place, and without the folder it was made from."""
        moved = folder.with_name("moved")
        folder.rename(moved)
        try:
            run = subprocess.run(
                [sys.executable, "-c", CALL_IN_A_FRESH_PROCESS, str(moved)],
                capture_output=True,
                text=True,
                check=False,
                cwd=folder.parent,
            )
        finally:
            moved.rename(folder)
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == str(PROMPT[0].tolist() + expected(predictor, 3))

    def test_what_its_card_says_works(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        program = card.split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(folder.parent)
        exec(program, {})
        assert capsys.readouterr().out.startswith("def ")
        assert (folder / PREDICTOR_FOLDER / CARD_FILE).is_file()  # where the card sends its reader

    def test_is_a_checkpoint_as_well(self, folder: Path, predictor: PredictorNetwork) -> None:
        loaded = load_network(folder)
        assert loaded.config.backbone.path == str(folder)
        assert expected(loaded, 3) == expected(predictor, 3)
        state, own = loaded.trainable_state(), predictor.trainable_state()
        assert state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)

    def test_names_the_folder_in_generate(self, folder: Path, predictor: PredictorNetwork) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        options = {"custom_generate": str(folder), "max_new_tokens": 12, "seed": 3, "eos_token_id": None} | SAMPLED
        with pytest.raises(ValueError, match="trust_remote_code"):
            model.generate(PROMPT, **options, trust_remote_code=False)
        for _ in range(2):  # the second call finds the predictor in place
            found = model.generate(PROMPT, **options, trust_remote_code=True)
            assert found.tolist() == [PROMPT[0].tolist() + expected(predictor, 3)]

    def test_a_model_from_elsewhere_is_refused(self, folder: Path, base: Path) -> None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
        with pytest.raises(FileNotFoundError, match=PREDICTOR_FOLDER):
            model.generate(PROMPT, custom_generate=str(folder), trust_remote_code=True, max_new_tokens=3)  # pyright: ignore[reportCallIssue]

    def test_appears_complete_or_not_at_all(
        self, predictor: PredictorNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*_: object, **__: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr("ptp_lightning.export.model_folder.save_network", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_with_base_model(predictor, tmp_path / "whole")
        assert list(tmp_path.iterdir()) == []

    def test_a_taken_folder_is_refused(self, predictor: PredictorNetwork, folder: Path) -> None:
        before = (folder / GENERATE_FILE).stat().st_mtime_ns
        with pytest.raises(ValueError, match="new or empty"):
            save_with_base_model(predictor, folder)
        assert (folder / GENERATE_FILE).stat().st_mtime_ns == before
