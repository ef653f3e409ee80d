"""Streamers of transformers: they get the tokens that a call verified at once, as bursts."""

from __future__ import annotations

import asyncio
import threading
from itertools import chain

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, TextIteratorStreamer

from ptp_lightning.decoding.transformers_generate import generate_with_predictor
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models import PredictorNetwork
from ptp_lightning.utils.pretrained import embedded_folder

PROMPT = "def add(first, second):\n    return "
MAX_NEW_TOKENS = 20


@pytest.fixture(scope="module")
def predictor() -> PredictorNetwork:
    """Trained: most of its calls verify several tokens."""
    return load_network("code")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_folder())


@pytest.fixture(scope="module")
def text(predictor: PredictorNetwork, tokenizer) -> list[int]:
    """The greedy continuation."""
    return call(predictor, tokenizer)


class Bursts:
    """A streamer that keeps what it gets, one entry a call."""

    def __init__(self) -> None:
        self.token_ids: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.token_ids.append(value.flatten().tolist())

    def end(self) -> None:
        self.token_ids.append([])


def call(predictor: PredictorNetwork, its_tokenizer, **options) -> list[int]:
    inputs = its_tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False} | options
    result = generate_with_predictor(predictor, **inputs, **options)
    return result[0, inputs["input_ids"].shape[1] :].tolist()


def test_bursts_are_whole_calls(predictor: PredictorNetwork, tokenizer, text: list[int]) -> None:
    streamer = Bursts()
    assert call(predictor, tokenizer, streamer=streamer) == text
    prompt, *bursts, end = streamer.token_ids
    assert prompt == tokenizer(PROMPT)["input_ids"] and end == []
    assert list(chain(*bursts)) == text
    assert len(bursts) <= len(text) / 2


def test_a_stopping_criterion_ends_within_a_burst(predictor: PredictorNetwork, tokenizer, text: list[int]) -> None:
    num_prompt_tokens = len(tokenizer(PROMPT)["input_ids"])
    for length in range(1, 5):
        streamer = Bursts()

        def is_long(input_ids: Tensor, _: object, length: int = length, **__: object) -> Tensor:
            return torch.tensor([input_ids.shape[1] == num_prompt_tokens + length])

        assert call(predictor, tokenizer, streamer=streamer, stopping_criteria=[is_long]) == text[:length]
        assert list(chain(*streamer.token_ids[1:])) == text[:length]


def test_text_of_an_iterator(predictor: PredictorNetwork, tokenizer, text: list[int]) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    thread = threading.Thread(target=call, args=(predictor, tokenizer), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == tokenizer.decode(text)
    thread.join()


def test_text_of_the_server(predictor: PredictorNetwork, tokenizer, text: list[int]) -> None:
    """The streamer of `transformers serve`, which a client that goes away cancels."""
    from transformers.cli.serving.utils import DirectStreamer, _GenerationCancelled

    async def served() -> tuple[list[str], int]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        streamer = DirectStreamer(tokenizer._tokenizer, asyncio.get_running_loop(), queue)
        await asyncio.to_thread(call, predictor, tokenizer, streamer=streamer)
        pieces = []
        while (piece := await asyncio.wait_for(queue.get(), timeout=20)) is not None:
            pieces.append(piece)
        streamer.cancel()
        with pytest.raises(_GenerationCancelled):
            await asyncio.to_thread(call, predictor, tokenizer, streamer=streamer)
        await asyncio.sleep(0)
        assert queue.empty()  # the server itself ends the stream, with the error
        return pieces, streamer.total_tokens

    pieces, total_tokens = asyncio.run(served())
    assert "".join(pieces) == tokenizer.decode(text)
    assert total_tokens == len(text)


def test_stop_strings_of_a_configuration(predictor: PredictorNetwork, tokenizer, text: list[int]) -> None:
    """As `transformers serve` gives them."""
    whole = tokenizer.decode(text)
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, stop_strings=["\n"])
    options = {"generation_config": config, "max_new_tokens": None, "do_sample": None}
    stopped = tokenizer.decode(call(predictor, tokenizer, tokenizer=tokenizer, **options))
    assert whole.startswith(stopped) and len(stopped) < len(whole)
    assert "\n" in stopped
    assert config.stop_strings == ["\n"]
    with pytest.raises(ValueError, match="expected a tokenizer with stop_strings"):
        call(predictor, tokenizer, **options)
