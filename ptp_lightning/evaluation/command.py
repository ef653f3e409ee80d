"""The command `evaluate`: writes a report of the decoders of a checkpoint on a file of questions."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ptp_lightning.decoding import GenerationSettings
from ptp_lightning.decoding.devices import select_device
from ptp_lightning.decoding.drafting import num_tree_tokens
from ptp_lightning.decoding.model_settings import TAKEN_OVER, with_model_settings
from ptp_lightning.decoding.partial_quadratic import require_slots_in_calls
from ptp_lightning.decoding.slot_budget import measure_best_budget
from ptp_lightning.decoding.text import end_of_text_ids, tokenizer_of
from ptp_lightning.evaluation.acceptance_gap import acceptance_gaps
from ptp_lightning.evaluation.decoder_names import (
    AUTOREGRESSIVE,
    DECODER_NAMES,
    PARTIAL_QUADRATIC,
    PROMPT_LOOKUP,
    TRANSFORMERS,
)
from ptp_lightning.evaluation.decoders import Decoder, make_decoders
from ptp_lightning.evaluation.near_ties import Deviation, first_difference, is_explained_by_rounding
from ptp_lightning.evaluation.questions import read_questions
from ptp_lightning.evaluation.records import Record, RecordFile, stored_budgets
from ptp_lightning.evaluation.report import Report
from ptp_lightning.evaluation.runner import EvaluationPlan, prompt_of, require_positions
from ptp_lightning.evaluation.runner import run as run_plan
from ptp_lightning.evaluation.summary import OVERALL, scores
from ptp_lightning.export.checkpoint import build_network, stored_positions
from ptp_lightning.export.options import predictor_options, predictor_source
from ptp_lightning.export.stored_predictor import read_predictor
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.utils.local_paths import WRITTEN, local_folder
from ptp_lightning.utils.progress_lines import LinePacer, print_line
from ptp_lightning.utils.user_errors import warnings_as_notes

if TYPE_CHECKING:
    from collections.abc import Callable

    from jsonargparse import Namespace
    from transformers import PreTrainedTokenizerBase

HASH_LENGTH = 12


def run(options: Namespace) -> None:
    """Run an evaluation, or continue it.

    Raises:
        ValueError: an option is out of range, a question is invalid, or `--output` contains another
            evaluation. These are checked before the first answer.
        FileNotFoundError: the checkpoint or the file of questions does not exist.
    """
    source = predictor_source(options)
    for name in ("limit", "seeds"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"expected --{name} >= 1, found {options[name]}")
    questions = read_questions(options.benchmark, options.questions, options.limit)
    # Checked before the model is loaded.
    folder = local_folder(options.output, "--output", WRITTEN)
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens, num_draft_tokens=options.num_draft_tokens)

    device = select_device(options.device)
    with warnings_as_notes():
        stored = read_predictor(source)
        require_positions(stored_positions(stored, **predictor_options(options)), settings)
        predictor = build_network(stored, **predictor_options(options)).to(device).eval()
    require_positions(predictor.max_positions, settings)  # of a model that is no folder
    tokenizer = tokenizer_of(predictor)
    ends = end_of_text_ids(predictor, tokenizer, chat=tokenizer.chat_template is not None)  # see make_prompt
    settings = _complete_settings(settings, options, predictor, ends)
    temperatures = options.temperatures or [predictor.config.sampling.temperature]
    for temperature in temperatures:
        replace(settings.sampling, temperature=temperature)  # checks the range
    plan = EvaluationPlan(questions, range(options.seeds), temperatures, settings)

    names = _decoder_names(options.decoders, predictor)
    needs_base_model = bool({TRANSFORMERS, PROMPT_LOOKUP} & set(names))
    base_model = load_backbone(predictor.config.backbone).to(device).eval() if needs_base_model else None  # pyright: ignore[reportArgumentType]
    budgets = _slot_budgets(options, folder, predictor, settings) if PARTIAL_QUADRATIC in names else []
    decoders = make_decoders(names, predictor, base_model, budgets)
    description = _describe(options, plan, decoders, budgets, predictor)
    file = RecordFile(folder, description)

    with _progress(plan.num_records(len(decoders))) as advance:
        run_plan(plan, decoders, predictor, tokenizer, file, advance)
    report = _report(plan, decoders, predictor, tokenizer, file, description)
    report.write(file.records.values(), folder)
    print(_summary(report, folder))


def _decoder_names(given: list[str] | None, predictor: PredictorNetwork) -> list[str]:
    """By default all that the predictor's slots allow."""
    if given is None:
        return [name for name in DECODER_NAMES if name != PARTIAL_QUADRATIC or not predictor.first_slot_layer]
    if PARTIAL_QUADRATIC in given:
        require_slots_in_calls(predictor)
    return list(dict.fromkeys(given))


def _complete_settings(
    settings: GenerationSettings, options: Namespace, predictor: PredictorNetwork, ends: frozenset[int]
) -> GenerationSettings:
    """Complete the settings by the options, and by the predictor's values for options that are not given."""
    given = {name: options[name] for name in ("top_k", "top_p") if options[name] is not None}
    length = predictor.config.window_length if options.window_length is None else options.window_length
    chosen = [*given, *(["temperature"] if options.temperatures else [])]
    sampling = with_model_settings(predictor, replace(predictor.config.sampling, **given), given=chosen)
    return replace(settings, sampling=sampling, window_length=length, end_of_text=ends)


def _slot_budgets(
    options: Namespace, folder: Path, predictor: PredictorNetwork, settings: GenerationSettings
) -> list[int]:
    """The slot budgets of the options; `auto` is measured once, and read from the folder by a continued evaluation."""
    given: list[int | str] = options.slot_budget
    if "auto" in given and (stored := stored_budgets(folder, given)) is not None:
        return stored
    budgets = []
    for budget in given:
        if isinstance(budget, str):
            _, _, budget = measure_best_budget(predictor, settings)
        budgets.append(replace(settings, slot_budget=budget).slot_budget)
    return list(dict.fromkeys(budgets))


def _describe(
    options: Namespace,
    plan: EvaluationPlan,
    decoders: Sequence[Decoder],
    budgets: Sequence[int],
    predictor: PredictorNetwork,
) -> dict[str, Any]:
    """The description of the evaluation, which must match that of the folder."""
    weights = hashlib.sha256()
    for _, value in sorted(predictor.trainable_state().items()):
        weights.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    sampling = plan.settings.sampling
    content = repr([(question.question_id, question.turns) for question in plan.questions])
    return {
        "checkpoint": predictor_source(options) or "the embedded adapter",
        "base": options.base,
        "weights": weights.hexdigest()[:HASH_LENGTH],
        "benchmark": options.benchmark,
        "questions": options.questions,
        "questions_hash": hashlib.sha256(content.encode()).hexdigest()[:HASH_LENGTH],
        "num_questions": len(plan.questions),
        "seeds": options.seeds,
        "temperatures": list(plan.temperatures),
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        **{name: value for name in TAKEN_OVER if (value := getattr(sampling, name)) is not None},
        "max_new_tokens": plan.settings.max_new_tokens,
        "window_length": plan.settings.window_length,
        "num_draft_tokens": num_tree_tokens(predictor, plan.settings),
        "decoders": [decoder.name for decoder in decoders],
        "slot_budgets": list(budgets),
        "device": str(predictor.base_model.device),
        "dtype": str(predictor.base_model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def _report(
    plan: EvaluationPlan,
    decoders: Sequence[Decoder],
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
    description: dict[str, Any],
) -> Report:
    records = list(file.records.values())
    exact = [decoder.name for decoder in decoders if decoder.is_exact]
    config = predictor.config
    trained_temperature = None if config.sampling_range is not None else config.sampling.temperature
    truncated = {record.key._replace(decoder="", seed=0) for record in records if record.num_truncated}
    return Report(
        run=description,
        scores=scores(records, [decoder.name for decoder in decoders], exact),
        gaps=acceptance_gaps(records, plan.settings.window_length, predictor.prefix_counts, trained_temperature),
        deviations=_deviations(plan, exact, predictor, tokenizer, file),
        num_truncated=len(truncated),
    )


def _deviations(
    plan: EvaluationPlan,
    exact: Sequence[str],
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
) -> list[Deviation]:
    found = []
    questions = {question.question_id: question for question in plan.questions}
    for key, record in file.records.items():
        if key.decoder not in exact:
            continue
        reference = file.records[key._replace(decoder=AUTOREGRESSIVE)].token_ids
        position = first_difference(record.token_ids, reference)
        if position is None:
            continue
        prompt = prompt_of(questions[key.question_id], key, plan, predictor, tokenizer, file)
        settings = replace(
            plan.settings, seed=key.seed, sampling=replace(plan.settings.sampling, temperature=key.temperature)
        )
        near_tie = position < len(record.token_ids) and is_explained_by_rounding(
            predictor, prompt.token_ids, reference, position, record.token_ids[position], settings
        )
        found.append(Deviation(key.decoder, key.question_id, key.turn, key.seed, key.temperature, position, near_tie))
    return found


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Record], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        pacer = None if progress.console.is_terminal else LinePacer()
        finished = 0

        def advance(record: Record) -> None:
            nonlocal finished
            finished += 1
            answer = f"{record.category} {record.question_id}: {record.decoder}"
            progress.update(task, completed=finished, description=answer)
            if pacer is not None and pacer.is_due(finished / total):
                print_line(
                    f"answers {finished}/{total} ({finished / total:.0%})", answer, pacer.time_left(finished / total)
                )

        yield advance


def _summary(report: Report, folder: Path) -> str:
    lines = []
    for score in report.scores:
        if score.category == OVERALL:
            exact = "" if score.num_identical is None else f", {score.num_identical} of {score.num_answers} identical"
            lines.append(
                f"T {score.temperature:g} {score.decoder}: {score.tokens_per_call:.2f} tokens per call, "
                f"{score.speed.value:.2f} times the speed of autoregressive decoding{exact}"
            )
    return "\n".join([*lines, f"Report      {folder / 'report.md'}"])
