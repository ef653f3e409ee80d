"""The options of `pregenerate`, and its entry, which explains them without importing the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptp_lightning.utils.short_help import all_options, configured_help, wants_help

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PROMPT_TOKENS_HELP = (
    "prompts are the prompts of documents (skipped if no completion fits into data.row_length after them); for a "
    "document without a prompt, its first tokens, at most this many; with --self_prompted, the longest user turn"
)
NUM_PROMPTS_HELP = (
    "null is all; otherwise evenly spaced over a corpus, or the first ones of a stream or of --prompts; with "
    "--self_prompted, those of --prompts included"
)
PROMPTS_HELP = "FILE:COLUMN of JSON lines each, instead of data; user turns, if the tokenizer has a chat template"
SELF_PROMPTED_HELP = "a chat model writes user turns itself, instead of data or after --prompts, and answers them"
TOPICS_HELP = "YAML list of system, weight and openings that steer --self_prompted; by default that of the package"
DESCRIPTION = "Sample completions of a teacher, to train on. The same command continues a stopped run."
SHARD_PROMPTS_HELP = (
    "prompts per file, of which a killed run loses at most one; by default as many as make a batch, or as in the "
    "folder that is continued"
)


def run(args: Sequence[str]) -> None:
    """Print help, or see `ptp_lightning.pregeneration.command.run`."""
    if wants_help(args):
        print(configured_help("pregenerate", DESCRIPTION, add_pregeneration_options))
        return
    from ptp_lightning.pregeneration.command import run as run_command

    run_command(all_options(args))


def add_pregeneration_options(parser: ArgumentParser) -> None:
    """Add the options that `fit` does not have."""
    add = parser.add_argument
    add("--output", type=str, required=True, help="folder of the completions; a stopped run is continued")
    add("--num_completions", type=int, default=1, help="completions per prompt, with different seeds")
    add("--max_new_tokens", type=int, default=192, help="maximum length of a completion")
    add("--prompt_tokens", type=int, default=64, help=PROMPT_TOKENS_HELP)
    add("--num_prompts", type=int | None, default=None, help=NUM_PROMPTS_HELP)
    add("--prompts", type=str, nargs="+", default=[], help=PROMPTS_HELP)
    add("--self_prompted", action="store_true", help=SELF_PROMPTED_HELP)
    add("--topics", type=str | None, default=None, help=TOPICS_HELP)
    add("--greedy_fraction", type=float, default=0.0, help="share of the prompts whose first completion is greedy")
    add("--batch_size", type=int, default=32, help="completions generated in parallel; has no effect on them")
    add("--seed", type=int, default=0, help="from which the seeds of all completions are derived")
    add("--shard_prompts", type=int | None, default=None, help=SHARD_PROMPTS_HELP)
