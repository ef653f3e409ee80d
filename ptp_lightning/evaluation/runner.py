"""Runs an evaluation: all decoders answer each turn, one after another in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ptp_lightning.decoding import GenerationSettings
from ptp_lightning.evaluation.acceptance_gap import correct_tokens_at_all_positions
from ptp_lightning.evaluation.conversation import Prompt, make_prompt
from ptp_lightning.evaluation.decoder_names import AUTOREGRESSIVE
from ptp_lightning.evaluation.decoders import Answer, Decoder
from ptp_lightning.evaluation.memory import PeakMemory
from ptp_lightning.evaluation.questions import Question
from ptp_lightning.evaluation.records import ALL_POSITIONS, Record, RecordFile, RunKey
from ptp_lightning.models.network import PredictorNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate.

    Attributes:
        questions: in this order.
        seeds: of the auxiliary variables.
        temperatures: of the sampling.
        settings: all other settings.
    """

    questions: Sequence[Question]
    seeds: Sequence[int]
    temperatures: Sequence[float]
    settings: GenerationSettings

    def num_records(self, num_decoders: int) -> int:
        """Number of records, including those of `ALL_POSITIONS`."""
        turns = sum(len(question.turns) for question in self.questions) * len(self.temperatures)
        return turns * (len(self.seeds) * num_decoders + 1)


def run(
    plan: EvaluationPlan,
    decoders: Sequence[Decoder],
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
    on_record: Callable[[Record], None],
) -> None:
    """Produce the records that the file does not contain yet.

    All decoders answer a prompt before the next one, and their order rotates from prompt to prompt, so that changes of
    the machine's speed affect all of them. Later turns continue the autoregressive decoder's answer for all decoders.

    Args:
        plan: what to evaluate.
        decoders: including the autoregressive decoder.
        predictor: in eval mode.
        tokenizer: of the base model.
        file: to which each record is appended immediately.
        on_record: called for each record, including existing ones.
    """
    _warm_up(plan, decoders, tokenizer)
    num_prompts = 0
    for temperature in plan.temperatures:
        for question in plan.questions:
            for seed in plan.seeds:
                sampling = replace(plan.settings.sampling, temperature=temperature)
                settings = replace(plan.settings, sampling=sampling, seed=seed)
                for turn in range(len(question.turns)):
                    reference = RunKey(question.question_id, turn, seed, temperature, AUTOREGRESSIVE)
                    prompt = prompt_of(question, reference, plan, predictor, tokenizer, file)
                    first = num_prompts % len(decoders)
                    num_prompts += 1
                    for decoder in (*decoders[first:], *decoders[:first]):
                        key = reference._replace(decoder=decoder.name)
                        if key not in file.records:
                            file.append(_record(question, key, prompt, decoder, settings, predictor))
                        on_record(file.records[key])
                    if seed == plan.seeds[0]:
                        key = reference._replace(decoder=ALL_POSITIONS)
                        if key not in file.records:
                            text = file.records[reference].token_ids
                            correct = correct_tokens_at_all_positions(predictor, prompt.token_ids, text, settings)
                            file.append(
                                _as_record(question, key, prompt, Answer([], 0, 0.0, {}, correct, []), peak_bytes=0)
                            )
                        on_record(file.records[key])


def require_positions(limit: int | None, settings: GenerationSettings) -> None:
    """Refuse answers that leave no position of the base model for a prompt; prompts themselves are shortened.

    Args:
        limit: the base model's positions; None if it has no limit, or it is not known.
        settings: of the answers.

    Raises:
        ValueError: names the option.
    """
    if limit is not None and settings.max_new_tokens >= limit:
        raise ValueError(
            f"expected max_new_tokens < {limit}, found {settings.max_new_tokens}: set max_new_tokens (the base model "
            f"has {limit} positions, and a prompt needs one)"
        )


def prompt_of(
    question: Question,
    key: RunKey,
    plan: EvaluationPlan,
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
) -> Prompt:
    """The prompt of a turn: the earlier turns with the autoregressive decoder's answers, and the turn itself."""
    earlier = [key._replace(turn=turn, decoder=AUTOREGRESSIVE) for turn in range(key.turn)]
    answers = [str(tokenizer.decode(file.records[own].token_ids, skip_special_tokens=True)) for own in earlier]
    history = list(zip(question.turns, answers, strict=False))
    limit = predictor.max_positions
    max_tokens = None if limit is None else limit - plan.settings.max_new_tokens
    return make_prompt(tokenizer, history, question.turns[key.turn], max_tokens)


def _warm_up(plan: EvaluationPlan, decoders: Sequence[Decoder], tokenizer: PreTrainedTokenizerBase) -> None:
    """Let each decoder allocate memory and select kernels."""
    prompt = make_prompt(tokenizer, [], plan.questions[0].turns[0], max_tokens=WARM_UP_TOKENS)
    for decoder in decoders:
        decoder.answer(prompt.token_ids, replace(plan.settings, max_new_tokens=WARM_UP_TOKENS, seed=0))


def _record(
    question: Question,
    key: RunKey,
    prompt: Prompt,
    decoder: Decoder,
    settings: GenerationSettings,
    predictor: PredictorNetwork,
) -> Record:
    with PeakMemory(predictor.base_model.device) as memory:
        answer = decoder.answer(prompt.token_ids, settings)
    return _as_record(question, key, prompt, answer, memory.peak_bytes)


def _as_record(question: Question, key: RunKey, prompt: Prompt, answer: Answer, peak_bytes: int) -> Record:
    return Record(
        question_id=question.question_id,
        category=question.category,
        turn=key.turn,
        seed=key.seed,
        temperature=key.temperature,
        decoder=key.decoder,
        num_prompt_tokens=len(prompt.token_ids),
        num_truncated=prompt.num_truncated,
        token_ids=answer.token_ids,
        num_calls=answer.num_calls,
        seconds=answer.seconds,
        phases=dict(answer.phases),
        peak_bytes=peak_bytes,
        correct_per_cycle=answer.correct_per_cycle,
        drafted_per_cycle=answer.drafted_per_cycle,
        committed_per_cycle=answer.committed_per_cycle,
    )
