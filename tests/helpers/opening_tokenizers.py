"""Tiny tokenizers that put before a text what those of well-known models put there."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def _vocabulary(*special: str) -> dict[str, int]:
    return {entry: number for number, entry in enumerate([*special, *LETTERS])}


def llama_2() -> PreTrainedTokenizerBase:
    """`<s>` before a text."""
    return LlamaTokenizer(vocab=_vocabulary("<unk>", "<s>", "</s>", "▁"), merges=[], add_bos_token=True)


def llama_2_with_end() -> PreTrainedTokenizerBase:
    """`<s>` before a text and `</s>` after it."""
    vocabulary = _vocabulary("<unk>", "<s>", "</s>", "▁")
    return LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, add_eos_token=True)


def gemma() -> PreTrainedTokenizerBase:
    """`<bos>` before a text."""
    vocabulary = _vocabulary("<pad>", "<eos>", "<bos>", "<unk>", "▁")
    return GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)


def llama_3() -> PreTrainedTokenizerBase:
    """`<|begin_of_text|>` before a text, by the post-processor of tokenizer.json alone."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(begin, end, "Ġ"), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)


def gpt_2() -> PreTrainedTokenizerBase:
    """Nothing before a text; the beginning of a text is declared to be the token after it."""
    return GPT2Tokenizer(vocab=_vocabulary("<|endoftext|>", "Ġ"), merges=[])


OPENINGS = {llama_2: [1], llama_2_with_end: [1], gemma: [2], llama_3: [0], gpt_2: []}
"""Tokenizers, and the tokens that each puts before a text."""
