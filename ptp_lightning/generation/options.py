"""The options of `generate`; the command itself is imported when they are valid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ptp_lightning.export.options import add_draft_options, add_predictor_options
from ptp_lightning.option_names import DEFAULT_DECODER, DecoderName
from ptp_lightning.utils.user_errors import option_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def build_parser() -> ArgumentParser:
    """The parser of all options."""
    parser = option_parser(
        "generate",
        "Continue prompts: the base model's own samples, several tokens per call.",
    )
    add = parser.add_argument
    add_predictor_options(parser)
    add("--prompt", type=str, help="text to continue; if it begins with a dash, write --prompt=-TEXT")
    add("--prompts", type=str, help="file with one prompt per line")
    add("--max_new_tokens", type=int, default=64, help="the text ends here or at an end-of-text token")
    add("--temperature", type=float, help="0 is greedy; this and the next two are by default the adapter's own")
    add("--top_k", type=int, help="keep the k most likely tokens; more than the vocabulary keeps all")
    add("--top_p", type=float, help="keep the most likely tokens that hold this mass together")
    of_model = "by default that of the model's generation_config.json"
    add("--min_p", type=float, help=f"keep tokens with this share of the largest probability; {of_model}")
    add("--repetition_penalty", type=float, help=f"lowers logits of tokens in the text or prompt; {of_model}")
    add("--no_repeat_ngram_size", type=int, help=f"no sequence of n tokens occurs twice; {of_model}")
    add("--stop", type=str, nargs="+", default=[], help="strings before which the text ends")
    add("--seed", type=int, default=0, help="of the auxiliaries; all decoders give the same text for it")
    add(
        "--decoder",
        type=DecoderName,
        default=DEFAULT_DECODER,
        help="several tokens per call, with or without drafts from the text and from n-grams (lookup), or one "
        "(autoregressive, the reference)",
    )
    add_draft_options(parser)
    add(
        "--slot_budget",
        type=Literal["auto"] | int,
        default="auto",
        help="slots of a call of partial quadratic decoding; auto measures what is fastest here",
    )
    add("--batch_size", type=int, default=1, help="prompts that are continued side by side; the texts are the same")
    add("--device", type=str, default="auto", help="auto takes a GPU where there is one")
    add("--chat", action="store_true", help="a prompt is a user's turn; the chat template of the tokenizer is applied")
    add("--system", type=str, help="system prompt of --chat; by default that of the template")
    add(
        "--compare",
        action="store_true",
        help="then measure this decoder, one token per call, and transformers.generate on the same prompts",
    )
    add(
        "--show_calls",
        action="store_true",
        help="show which tokens each cycle of calls wrote, in colours on a terminal (not with NO_COLOR), and behind "
        "them its wrong drafts; texts of a batch share calls, each shows those that it took part in",
    )
    add("--html", type=str, help="also write the texts so, to a self-contained page; replaces the file")
    add("--json", action="store_true", help="print one JSON object per prompt and nothing else")
    return parser
