"""A tokenizer of bytes with a chat template, whose turns are between special tokens."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.byte_tokenizer import END_OF_TEXT, byte_tokenizer

TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
CHAT_VOCABULARY = 259
END_OF_TURN_ID = CHAT_VOCABULARY - 1
DEFAULT_SYSTEM = "Be brief."
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """259 entries: those of `byte_tokenizer`, and the tokens before and after a turn. The end of text is another."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, END_OF_TURN]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(user: str, system: str = DEFAULT_SYSTEM) -> str:
    """What the template makes of a user's turn, up to the opening of the answer."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def letter_chat_tokenizer() -> PreTrainedTokenizerFast:
    """As `chat_tokenizer`, with a token per letter, so that any tokens are text: a random model writes user turns."""
    entries = [END_OF_TEXT, TURN, END_OF_TURN, "?", "\n", " ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({entry: k for k, entry in enumerate(entries)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    fast.add_special_tokens({"additional_special_tokens": [TURN, END_OF_TURN]})
    fast.chat_template = TEMPLATE
    return fast
