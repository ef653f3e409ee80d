"""The command `evaluate`: a checkpoint and a file of questions in, a report out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ptp_lightning.decoding import GenerationSettings
from ptp_lightning.decoding.devices import chosen_device
from ptp_lightning.decoding.packed_linear import pack_linear_layers
from ptp_lightning.decoding.slot_budget import measured_budget
from ptp_lightning.decoding.text import end_of_text_ids, tokenizer_of
from ptp_lightning.evaluation.benchmarks import BENCHMARKS, HELD_OUT_CODE, read_questions
from ptp_lightning.evaluation.contenders import (
    AUTOREGRESSIVE,
    CONTENDERS,
    PARTIAL_QUADRATIC,
    PROMPT_LOOKUP,
    TRANSFORMERS,
    Contender,
    make_contenders,
)
from ptp_lightning.evaluation.near_ties import Deviation, explains, first_difference
from ptp_lightning.evaluation.records import RUN_FILE, Record, RecordFile
from ptp_lightning.evaluation.report import Report
from ptp_lightning.evaluation.runner import Plan, prompt_of
from ptp_lightning.evaluation.runner import run as run_plan
from ptp_lightning.evaluation.summary import OVERALL, gaps, scores
from ptp_lightning.export.checkpoint import load_network, read_predictor
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.utils.user_errors import refused_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from jsonargparse import ArgumentParser, Namespace
    from transformers import PreTrainedTokenizerBase

HASH_LENGTH = 12


def run(args: Sequence[str]) -> None:
    """Run the evaluation that `args` describe, or what is left of it.

    Raises:
        ValueError: an option is unknown or out of range, a question is malformed, or `--output` holds another
            evaluation; before the first answer.
        FileNotFoundError: the checkpoint or the questions are not there.
    """
    try:
        options = _parser().parse_args(list(args))
    except ArgumentError as error:
        raise refused_options("evaluate", error) from error
    for name in ("limit", "seeds"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"expected --{name} >= 1, found {options[name]}")
    questions = read_questions(options.benchmark, options.questions, options.limit)
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens)  # refused before the model is loaded

    device = chosen_device(options.device)
    predictor = _load(options.ckpt_path, options.dtype).to(device).eval()
    tokenizer = tokenizer_of(predictor)
    settings = _completed(settings, options, predictor, end_of_text_ids(predictor, tokenizer))
    temperatures = options.temperatures or [predictor.config.sampling.temperature]
    for temperature in temperatures:
        replace(settings.sampling, temperature=temperature)  # refuses what is out of range
    plan = Plan(questions, range(options.seeds), temperatures, settings)

    names = list(dict.fromkeys(options.decoders))
    library = {TRANSFORMERS, PROMPT_LOOKUP} & set(names)
    plain = load_backbone(predictor.config.backbone).to(device).eval() if library else None  # pyright: ignore[reportArgumentType]
    if plain is not None:
        pack_linear_layers(plain)  # as our decoders do with theirs: prompt lookup, too, verifies several tokens a call
    budgets = _slot_budgets(options, predictor, settings) if PARTIAL_QUADRATIC in names else []
    contenders = make_contenders(names, predictor, plain, budgets)
    folder = Path(options.output).expanduser()
    described = _describe(options, plan, contenders, budgets, predictor)
    file = RecordFile(folder, described)

    with _progress(plan.num_runs(len(contenders))) as advance:
        run_plan(plan, contenders, predictor, tokenizer, file, advance)
    report = _report(plan, contenders, predictor, tokenizer, file, described)
    report.write(file.records.values(), folder)
    print(_closing_words(report, folder))


def _load(path: str | None, dtype: Literal["float32", "bfloat16"] | None) -> PredictorNetwork:
    if dtype is None:
        return load_network(path)
    backbone = PredictorConfig.from_dict(read_predictor(path).config).backbone
    return load_network(path, backbone=replace(backbone, dtype=dtype))


def _completed(
    settings: GenerationSettings, options: Namespace, predictor: PredictorNetwork, ends: frozenset[int]
) -> GenerationSettings:
    """The predictor's own values for what the options leave open."""
    given = {name: options[name] for name in ("top_k", "top_p") if options[name] is not None}
    length = predictor.config.window_length if options.window_length is None else options.window_length
    sampling = replace(predictor.config.sampling, **given)
    return replace(settings, sampling=sampling, window_length=length, end_of_text=ends)


def _slot_budgets(options: Namespace, predictor: PredictorNetwork, settings: GenerationSettings) -> list[int]:
    """The slot budgets that were asked for; `auto` is measured once, and taken over by an evaluation that goes on."""
    asked: list[int | str] = options.slot_budget
    stored = Path(options.output).expanduser() / RUN_FILE
    if "auto" in asked and stored.is_file():
        return json.loads(stored.read_text(encoding="utf-8"))["slot_budgets"]
    budgets = []
    for budget in asked:
        if isinstance(budget, str):
            _, _, budget = measured_budget(predictor, settings)
        budgets.append(replace(settings, slot_budget=budget).slot_budget)
    return list(dict.fromkeys(budgets))


def _describe(
    options: Namespace,
    plan: Plan,
    contenders: Sequence[Contender],
    budgets: Sequence[int],
    predictor: PredictorNetwork,
) -> dict[str, Any]:
    """What another evaluation in the same folder has to agree with."""
    weights = hashlib.sha256()
    for _, value in sorted(predictor.trainable_state().items()):
        weights.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    asked = repr([(question.question_id, question.turns) for question in plan.questions])
    return {
        "checkpoint": options.ckpt_path or "the embedded adapter",
        "weights": weights.hexdigest()[:HASH_LENGTH],
        "benchmark": options.benchmark,
        "questions": options.questions,
        "questions_hash": hashlib.sha256(asked.encode()).hexdigest()[:HASH_LENGTH],
        "num_questions": len(plan.questions),
        "seeds": options.seeds,
        "temperatures": list(plan.temperatures),
        "top_k": plan.settings.sampling.top_k,
        "top_p": plan.settings.sampling.top_p,
        "max_new_tokens": plan.settings.max_new_tokens,
        "window_length": plan.settings.window_length,
        "contenders": [contender.name for contender in contenders],
        "slot_budgets": list(budgets),
        "device": str(predictor.base_model.device),
        "dtype": str(predictor.base_model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def _report(
    plan: Plan,
    contenders: Sequence[Contender],
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
    described: dict[str, Any],
) -> Report:
    records = list(file.records.values())
    exact = [contender.name for contender in contenders if contender.exact]
    config = predictor.config
    trained_temperature = None if config.sampling_range is not None else config.sampling.temperature
    cut = {record.key._replace(contender="", seed=0) for record in records if record.num_cut}
    return Report(
        run=described,
        scores=scores(records, [contender.name for contender in contenders], exact),
        gaps=gaps(records, plan.settings.window_length, predictor.prefix_counts, trained_temperature),
        deviations=_deviations(plan, exact, predictor, tokenizer, file),
        num_cut=len(cut),
    )


def _deviations(
    plan: Plan,
    exact: Sequence[str],
    predictor: PredictorNetwork,
    tokenizer: PreTrainedTokenizerBase,
    file: RecordFile,
) -> list[Deviation]:
    found = []
    questions = {question.question_id: question for question in plan.questions}
    for key, record in file.records.items():
        if key.contender not in exact:
            continue
        reference = file.records[key._replace(contender=AUTOREGRESSIVE)].token_ids
        place = first_difference(record.token_ids, reference)
        if place is None:
            continue
        prompt = prompt_of(questions[key.question_id], key, plan, predictor, tokenizer, file)
        settings = replace(
            plan.settings, seed=key.seed, sampling=replace(plan.settings.sampling, temperature=key.temperature)
        )
        explained = place < len(record.token_ids) and explains(
            predictor, prompt.token_ids, reference, place, record.token_ids[place], settings
        )
        found.append(Deviation(key.contender, key.question_id, key.turn, key.seed, key.temperature, place, explained))
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

        def advance(record: Record) -> None:
            progress.update(task, advance=1, description=f"{record.category} {record.question_id}: {record.contender}")

        yield advance


def _closing_words(report: Report, folder: Path) -> str:
    lines = []
    for score in report.scores:
        if score.category == OVERALL:
            exact = "" if score.num_identical is None else f", {score.num_identical} of {score.num_answers} identical"
            lines.append(
                f"T {score.temperature:g} {score.contender}: {score.tokens_per_call:.2f} tokens per call, "
                f"{score.speed.value:.2f} times the speed of one token a call{exact}"
            )
    return "\n".join([*lines, f"Report      {folder / 'report.md'}"])


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m ptp_lightning evaluate",
        description="Let all decoders answer the same questions, and report speed and exactness. Started again with "
        "the same --output, it goes on where it was stopped.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt_path", type=str, help="Lightning checkpoint or exported folder; by default the embedded adapter")
    add("--benchmark", type=Literal[tuple(BENCHMARKS)], default=HELD_OUT_CODE, help="what the questions are")
    add("--questions", type=str, help="file of the benchmark, as its authors publish it; held_out_code needs none")
    add("--output", type=str, required=True, help="folder of the report")
    add("--limit", type=int, help="use this many questions, from all categories in turn; by default all")
    add("--seeds", type=int, default=1, help="answers to each question, by seeds 0, 1, ..")
    add(
        "--decoders",
        type=Literal[CONTENDERS],
        nargs="+",
        default=list(CONTENDERS),
        help="who answers; the autoregressive decoder always does",
    )
    add("--max_new_tokens", type=int, default=64, help="of an answer")
    add("--temperatures", type=float, nargs="+", help="0 is greedy; by default the adapter's own")
    add("--top_k", type=int, help="by default the adapter's own")
    add("--top_p", type=float, help="by default the adapter's own")
    add("--dtype", type=Literal["float32", "bfloat16"], help="of the base model; by default as in training")
    add("--device", type=str, default="auto", help="auto takes a GPU where there is one")
    add("--window_length", type=int, help="tokens drafted per cycle; by default as in training")
    add(
        "--slot_budget",
        type=Literal["auto"] | int,
        nargs="+",
        default=["auto"],
        help="slots of a call of partial quadratic decoding; several are compared; auto measures what is fastest here",
    )
    return parser
