"""The options of `evaluate`; the command itself is imported when they are valid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ptp_lightning.evaluation.decoder_names import DECODER_NAMES
from ptp_lightning.evaluation.questions import BENCHMARKS, HELD_OUT_CODE
from ptp_lightning.export.options import add_draft_options, add_predictor_options
from ptp_lightning.utils.user_errors import option_parser

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def build_parser() -> ArgumentParser:
    """The parser of all options."""
    parser = option_parser(
        "evaluate",
        "Let all decoders answer the same questions, and report speed and exactness. Repeated with the "
        "same --output, the command continues a stopped evaluation.",
    )
    add = parser.add_argument
    add_predictor_options(parser)
    add("--benchmark", type=Literal[tuple(BENCHMARKS)], default=HELD_OUT_CODE, help="format of the questions")
    add("--questions", type=str, help="file of the benchmark, as published; not needed for held_out_code")
    add("--output", type=str, required=True, help="folder of the report")
    add("--limit", type=int, help="number of questions, interleaved over categories; by default all")
    add("--seeds", type=int, default=1, help="number of answers to each question, with seeds 0, 1, ..")
    add(
        "--decoders",
        type=Literal[DECODER_NAMES],
        nargs="+",
        help="decoders to evaluate, by default all that the adapter allows; autoregressive is always included",
    )
    add("--max_new_tokens", type=int, default=64, help="maximum length of an answer")
    add("--temperatures", type=float, nargs="+", help="0 is greedy; by default that of the adapter")
    add("--top_k", type=int, help="by default that of the adapter")
    add("--top_p", type=float, help="by default that of the adapter")
    add("--device", type=str, default="auto", help="auto uses a GPU if there is one")
    add_draft_options(parser)
    add(
        "--slot_budget",
        type=Literal["auto"] | int,
        nargs="+",
        default=["auto"],
        help="slots per call of partial quadratic decoding, one or several; auto measures the fastest number",
    )
    return parser
