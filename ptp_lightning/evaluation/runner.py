"""The run of an evaluation: all contenders answer each turn one after another, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ptp_lightning.decoding import GenerationSettings
from ptp_lightning.evaluation.benchmarks import Question
from ptp_lightning.evaluation.contenders import AUTOREGRESSIVE, Answer, Contender
from ptp_lightning.evaluation.conversation import Prompt, make_prompt
from ptp_lightning.evaluation.landing import correct_everywhere
from ptp_lightning.evaluation.memory import PeakMemory
from ptp_lightning.evaluation.records import Record, RecordFile, RunKey
from ptp_lightning.models.network import PredictorNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVERYWHERE = "everywhere"  # stands in records of `correct_everywhere`, which answers nothing
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        questions: in this order.
        seeds: of the auxiliaries.
        temperatures: of the sampling.
        settings: all else.
    """

    questions: Sequence[Question]
    seeds: Sequence[int]
    temperatures: Sequence[float]
    settings: GenerationSettings

    def num_runs(self, num_contenders: int) -> int:
        """How many records there will be, those of `EVERYWHERE` included."""
        turns = sum(len(question.turns) for question in self.questions) * len(self.temperatures)
        return turns * (len(self.seeds) * num_contenders + 1)


def run(
    plan: Plan,
    contenders: Sequence[Contender],
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
    on_record: Callable[[Record], None],
) -> None:
    """Answer what the file does not hold yet.

    The contenders take turns at each prompt, in an order that moves on from one prompt to the next, so that what slows
    the machine down slows them all down. A later turn continues the answer of the autoregressive decoder, whoever
    answers now.

    Args:
        plan: what to ask.
        contenders: the autoregressive decoder among them.
        predictor: in eval mode.
        tokenizer: of its base model.
        file: gets every record as soon as it is there.
        on_record: is called for every record, those that were there already included.
    """
    _warm_up(plan, contenders, tokenizer)
    num_prompts = 0
    for temperature in plan.temperatures:
        for question in plan.questions:
            for seed in plan.seeds:
                sampling = replace(plan.settings.sampling, temperature=temperature)
                settings = replace(plan.settings, sampling=sampling, seed=seed)
                for turn in range(len(question.turns)):
                    reference = RunKey(question.question_id, turn, seed, temperature, AUTOREGRESSIVE)
                    prompt = prompt_of(question, reference, plan, predictor, tokenizer, file)
                    first = num_prompts % len(contenders)
                    num_prompts += 1
                    for contender in (*contenders[first:], *contenders[:first]):
                        key = reference._replace(contender=contender.name)
                        if key not in file.records:
                            file.append(_record(question, key, prompt, contender, settings, predictor))
                        on_record(file.records[key])
                    if seed == plan.seeds[0]:
                        key = reference._replace(contender=EVERYWHERE)
                        if key not in file.records:
                            text = file.records[reference].token_ids
                            correct = correct_everywhere(predictor, prompt.token_ids, text, settings)
                            file.append(
                                _as_record(question, key, prompt, Answer([], 0, 0.0, {}, correct, []), peak_bytes=0)
                            )
                        on_record(file.records[key])


def prompt_of(
    question: Question,
    key: RunKey,
    plan: Plan,
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
) -> Prompt:
    """What is continued in a run: the turn, after earlier turns and the autoregressive decoder's answers to them."""
    earlier = [key._replace(turn=turn, contender=AUTOREGRESSIVE) for turn in range(key.turn)]
    answers = [str(tokenizer.decode(file.records[own].token_ids, skip_special_tokens=True)) for own in earlier]
    history = list(zip(question.turns, answers, strict=False))
    limit = predictor.max_positions
    room = None if limit is None else limit - plan.settings.max_new_tokens
    return make_prompt(tokenizer, history, question.turns[key.turn], room)


def _warm_up(plan: Plan, contenders: Sequence[Contender], tokenizer: PreTrainedTokenizerBase) -> None:
    """First calls allocate memory and choose kernels."""
    prompt = make_prompt(tokenizer, [], plan.questions[0].turns[0], room=WARM_UP_TOKENS)
    for contender in contenders:
        contender.answer(prompt.token_ids, replace(plan.settings, max_new_tokens=WARM_UP_TOKENS, seed=0))


def _record(
    question: Question,
    key: RunKey,
    prompt: Prompt,
    contender: Contender,
    settings: GenerationSettings,
    predictor: PredictorNetwork,
) -> Record:
    with PeakMemory(predictor.base_model.device) as memory:
        answer = contender.answer(prompt.token_ids, settings)
    return _as_record(question, key, prompt, answer, memory.peak_bytes)


def _as_record(question: Question, key: RunKey, prompt: Prompt, answer: Answer, peak_bytes: int) -> Record:
    return Record(
        question_id=question.question_id,
        category=question.category,
        turn=key.turn,
        seed=key.seed,
        temperature=key.temperature,
        contender=key.contender,
        num_prompt_tokens=len(prompt.token_ids),
        num_cut=prompt.num_cut,
        token_ids=answer.token_ids,
        num_calls=answer.num_calls,
        seconds=answer.seconds,
        phases=dict(answer.phases),
        peak_bytes=peak_bytes,
        correct_per_cycle=answer.correct_per_cycle,
        drafted_per_cycle=answer.drafted_per_cycle,
    )
