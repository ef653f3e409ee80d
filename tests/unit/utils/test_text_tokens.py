"""Texts begin with the tokens that the tokenizer puts before them, in training documents and in prompts alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ptp_lightning.data import Chat, Document, PlainText, PromptAndCompletion
from ptp_lightning.data.datamodule import tokenize
from ptp_lightning.decoding.generation import GenerationSettings
from ptp_lightning.decoding.text import encode_prompt
from ptp_lightning.evaluation.conversation import make_prompt
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.pregeneration.prompt_files import prompt_token_ids
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.chat_templates import chat_prompt, user_message
from ptp_lightning.utils.pretrained import load_tokenizer
from ptp_lightning.utils.text_tokens import ids_as_written, opening_ids, text_ids
from tests.helpers.opening_tokenizers import OPENINGS, TEMPLATE
from tests.helpers.tiny_predictors import tiny_predictor

MakeTokenizer = Callable[[], PreTrainedTokenizerBase]
every_tokenizer = pytest.mark.parametrize("make", OPENINGS, ids=lambda make: make.__name__)


@pytest.fixture(scope="module")
def predictor() -> PredictorNetwork:
    return tiny_predictor(vocab_size=64, sampling=SamplingConfig())


@every_tokenizer
class TestOneRule:
    def test_the_opening_is_that_of_the_tokenizer(self, make: MakeTokenizer) -> None:
        tokenizer = make()
        assert opening_ids(tokenizer) == OPENINGS[make]
        ids = text_ids(tokenizer, "hi")
        assert tokenizer.encode("hi")[: len(ids)] == ids

    def test_documents_and_prompts_begin_alike(self, make: MakeTokenizer, predictor: PredictorNetwork) -> None:
        tokenizer = make()
        expected = OPENINGS[make] + ids_as_written(tokenizer, "hi you")
        end = [tokenizer.eos_token_id]
        assert next(tokenize([Document("a", "hi you")], tokenizer)) == expected + end
        assert PlainText().document({"text": "hi you"}, tokenizer).token_ids == expected + end
        for pair in (("hi you", ""), ("", "hi you")):
            assert PromptAndCompletion(*pair).document({}, tokenizer).token_ids == expected + end
        assert encode_prompt(predictor, "hi you", tokenizer, GenerationSettings()) == expected
        assert make_prompt(tokenizer, [], "hi you", None).token_ids == expected
        assert prompt_token_ids("hi you", tokenizer) == expected

    def test_the_opening_of_a_prompt_is_not_learned(self, make: MakeTokenizer) -> None:
        tokenizer = make()
        document = PromptAndCompletion("hi", "you").document({}, tokenizer)
        num_learned = len(ids_as_written(tokenizer, "you")) + 1
        assert sum(document.completion_mask) == num_learned and all(document.completion_mask[-num_learned:])

    def test_a_text_that_begins_with_it_gets_no_second_one(
        self, make: MakeTokenizer, predictor: PredictorNetwork
    ) -> None:
        tokenizer = make()
        tokenizer.chat_template = TEMPLATE
        rendered = tokenizer.apply_chat_template(user_message("hi"), tokenize=False)
        assert isinstance(rendered, str)
        (begin,) = ids_as_written(tokenizer, str(tokenizer.bos_token))
        for token_ids in (
            text_ids(tokenizer, rendered),
            encode_prompt(predictor, rendered, tokenizer, GenerationSettings()),
            PlainText().document({"text": rendered}, tokenizer).token_ids,
        ):
            assert token_ids[0] == begin and token_ids[1] != begin

    def test_chats_are_encoded_as_the_template_writes_them(self, make: MakeTokenizer) -> None:
        tokenizer = make()
        tokenizer.chat_template = TEMPLATE
        prompt = chat_prompt(tokenizer, user_message("hi"))
        encoded: Any = tokenizer.apply_chat_template(user_message("hi"), add_generation_prompt=True)
        assert prompt == encoded["input_ids"]
        conversation = [*user_message("hi"), {"role": "assistant", "content": "you"}]
        document = Chat().document({"messages": conversation}, tokenizer)
        assert document.token_ids[: len(prompt)] == prompt

    def test_an_empty_document_teaches_nothing(self, make: MakeTokenizer) -> None:
        tokenizer = make()
        assert next(tokenize([Document("a", "")], tokenizer)) == [tokenizer.eos_token_id]
        assert not PlainText().document({"text": ""}, tokenizer).is_learned


@pytest.mark.parametrize("name", ["embedded", "smollm2"])
def test_packaged_models_put_nothing_before_a_text(name: str) -> None:
    assert opening_ids(load_tokenizer(name)) == []
