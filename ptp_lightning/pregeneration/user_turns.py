"""User turns that a chat model writes itself: it continues the opening of a user's turn in its chat template.

The model writes candidates in rounds, each a folder of completions, until enough of them are usable. A round depends
only on the settings and on earlier rounds, so that an interrupted run and several processes get the same turns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ptp_lightning.data.completions.completions import CompletionFolder, CompletionSettings, prompts_fingerprint
from ptp_lightning.decoding.text import IncrementalDetokenizer
from ptp_lightning.pregeneration.prompt_files import prompt_token_ids, same_words
from ptp_lightning.pregeneration.topics import Topic, draw_opening
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.chat_templates import special_ids, user_turn_opening
from ptp_lightning.utils.text_tokens import ids_as_written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "user_turns"
TEMPERATURE, TOP_P = 1.0, 0.95  # of user turns: they are to differ, and need not be good
EXPECTED_USABLE = 0.8  # of the candidates of the first round
MIN_USABLE = 0.02  # of all candidates; fewer is an error ..
NUM_BEFORE_ERROR = 64  # .. after this many
MIN_CANDIDATES = 4  # in a round
MAX_ROUNDS = 30
MIN_CHARACTERS = 12
INCOMPLETE = "\ufffd"  # replaces bytes that are no character

CompleteRound = Callable[[CompletionFolder, list[list[int]]], object]
"""Writes the missing shards of a folder, given its prompts."""


@dataclass(frozen=True)
class UserTurnPlan:
    """Which user turns to write.

    Args:
        topics: steer them.
        num_turns: how many.
        max_tokens: of a turn; a longer one is dropped.
        seed: of topics, openings and tokens.
        max_prompt_length: number of tokens of the longest prompt that a turn may make; None for no limit.
    """

    topics: Sequence[Topic]
    num_turns: int
    max_tokens: int
    seed: int
    max_prompt_length: int | None


def write_user_turns(
    plan: UserTurnPlan,
    output: Path,
    settings: CompletionSettings,
    tokenizer: PreTrainedTokenizerBase,
    complete: CompleteRound,
    known: Collection[str] = (),
) -> list[str]:
    """Texts of user turns, all different, in the order in which they were written.

    Args:
        plan: see `UserTurnPlan`.
        output: folder of the completions, in which the rounds are stored.
        settings: of the answers; the turns have the same teacher, ends and shards.
        tokenizer: with a chat template.
        complete: lets the teacher write a round.
        known: texts that are not to be repeated.

    Raises:
        ValueError: hardly any turn is usable, or the folder holds turns of other settings.
        OSError: the folder cannot be written to.
    """
    turns = {same_words(text): text for text in known}
    num_known, num_drawn = len(turns), 0
    for number in range(MAX_ROUNDS):
        num_found = len(turns) - num_known
        if num_found >= plan.num_turns:
            break
        if num_drawn >= NUM_BEFORE_ERROR and num_found < MIN_USABLE * num_drawn:
            raise ValueError(
                f"expected user turns of {MIN_CHARACTERS} characters to {plan.max_tokens} tokens that end, found "
                f"{num_found} among {num_drawn} that the model wrote: raise --prompt_tokens, change --topics, or use a "
                "chat model"
            )
        usable = max(num_found / num_drawn, MIN_USABLE) if num_drawn else EXPECTED_USABLE
        num_candidates = max(math.ceil((plan.num_turns - num_found) / usable), MIN_CANDIDATES)
        numbers = range(num_drawn, num_drawn + num_candidates)
        openings = [draw_opening(plan.topics, plan.seed, k) for k in numbers]
        prompts = [_opening_ids(topic, opening, tokenizer) for topic, opening in openings]
        folder = CompletionFolder.create(
            _round_folder(output, number), _round_settings(settings, plan, number, prompts)
        )
        complete(folder, prompts)
        completions = folder.read().completion_ids
        for row, ((_, opening), prompt) in enumerate(zip(openings, prompts, strict=True)):
            text = _turn(opening, prompt, completions.of(row), settings.ending_ids, tokenizer)
            if text is not None and _is_short(text, plan.max_prompt_length, tokenizer):
                turns.setdefault(same_words(text), text)
        num_drawn += num_candidates
    found = list(turns.values())[num_known : num_known + plan.num_turns]
    if len(found) < plan.num_turns:
        raise ValueError(
            f"expected {plan.num_turns} different user turns, found {len(found)} among {num_drawn} that the model "
            "wrote: lower --num_prompts, or add openings to --topics"
        )
    return found


def longest_opening(topics: Sequence[Topic], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens before a user turn's first own token, at most.

    Raises:
        ValueError: the chat template refuses a system prompt.
    """
    return max(len(_opening_ids(topic, opening, tokenizer)) for topic in topics for opening in topic.openings)


def first_round(output: Path) -> Path:
    """The folder of the first user turns, which exists before there are completions."""
    return _round_folder(output, 0)


def require_more_prompts(num_prompts: int | None, num_given: int) -> int:
    """Number of user turns to write.

    Raises:
        ValueError: it is not given, or files have enough prompts already.
    """
    if num_prompts is None or num_prompts <= num_given:
        given = f" above the {num_given} prompts of --prompts" if num_given else ""
        found = "none" if num_prompts is None else num_prompts
        raise ValueError(f"expected --num_prompts{given} with --self_prompted, found {found}: set --num_prompts")
    return num_prompts - num_given


def _round_folder(output: Path, number: int) -> Path:
    return output / FOLDER / f"round-{number:03d}"


def _is_short(text: str, max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    return max_length is None or len(prompt_token_ids(text, tokenizer)) <= max_length


def _opening_ids(topic: Topic, opening: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A blank at the end belongs to the first token that follows.
    text = user_turn_opening(tokenizer, topic.system) + opening.rstrip(" ")
    return ids_as_written(tokenizer, text)


def _round_settings(
    settings: CompletionSettings, plan: UserTurnPlan, number: int, prompts: Sequence[Sequence[int]]
) -> CompletionSettings:
    digest = hashlib.sha256(f"{plan.seed}/user turns/{number}".encode()).digest()
    return replace(
        settings,
        sampling=SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P, order=settings.sampling.order),
        max_new_tokens=plan.max_tokens,
        seed=int.from_bytes(digest[:8], "big") >> 1,
        num_prompts=len(prompts),
        num_completions=1,
        prompts=prompts_fingerprint(prompts),
        greedy_fraction=0.0,
    )


def _turn(
    opening: str,
    prompt: list[int],
    token_ids: Sequence[int],
    ending_ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    """The text of a turn; None if it did not end, is too short, or contains what no user types."""
    *body, last = token_ids
    if last not in ending_ids or special_ids(tokenizer) & set(body):
        return None
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    text = (opening.rstrip(" ") + detokenizer.push(body) + detokenizer.flush()).strip()
    return None if len(text) < MIN_CHARACTERS or INCOMPLETE in text else text
