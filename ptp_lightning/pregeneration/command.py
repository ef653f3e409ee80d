"""The command `pregenerate`: generates completions with the teacher of a configuration, to train from them later."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from ptp_lightning.data.completions.completions import (
    SETTINGS_FILE,
    Completion,
    CompletionFolder,
    CompletionSettings,
    prompts_fingerprint,
)
from ptp_lightning.data.text_datamodule import TextDataModule
from ptp_lightning.decoding.generation import OnTokens, require_room
from ptp_lightning.decoding.text import end_of_text_ids, tokenizer_of
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.pregeneration.options import add_pregeneration_options
from ptp_lightning.pregeneration.progress import ShardProgress, progress_bar
from ptp_lightning.pregeneration.prompt_files import prompt_token_ids, prompts_of_texts, read_prompt_texts
from ptp_lightning.pregeneration.prompts import find_prompts
from ptp_lightning.pregeneration.teacher_completions import complete_folder, generation_settings, sample_shard
from ptp_lightning.pregeneration.topics import read_topics
from ptp_lightning.pregeneration.user_turns import (
    UserTurnPlan,
    first_round,
    longest_opening,
    require_more_prompts,
    write_user_turns,
)
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.training.modules.predictor_module import PredictorModule, require_known_tokens
from ptp_lightning.utils.chat_templates import require_chat_template
from ptp_lightning.utils.local_paths import WRITTEN, local_path
from ptp_lightning.utils.user_errors import status_of

SIZES = ("num_completions", "max_new_tokens", "prompt_tokens", "num_prompts", "batch_size", "shard_prompts")
MAX_BYTES_PER_TOKEN = 4  # before compression
MILLION = 1_000_000
NO_DATA = "lightning.LightningDataModule"

TRAINING_CONFIG = """\
data:
  class_path: ptp_lightning.data.CompletionsDataModule
  init_args: {{folder: {folder}, row_length: {row_length}}}
model:
  init_args:
    source:
      class_path: ptp_lightning.training.DatasetWindows"""


class PregenerateParser(PlainErrorParser):
    """Errors refer to the help of this command."""

    command = "pregenerate"


class PregenerateCLI(TrainingCLI):
    """Builds the model and data that `fit` would train, and adds the options of this command."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command, and those of `fit`, which are ignored."""
        add_pregeneration_options(parser)
        skip: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        parser.add_method_arguments(Trainer, "fit", skip=skip)

    def before_instantiate_classes(self) -> None:
        """Check the options, and read the files of prompts and topics, before a model is loaded."""
        options = self.config
        for name in SIZES:
            value: int | None = options[name]
            if value is not None and value < 1:
                raise ValueError(f"expected --{name} >= 1, found {value}")
        if not 0 <= options.greedy_fraction <= 1:
            raise ValueError(f"expected --greedy_fraction between 0 and 1, found {options.greedy_fraction}")
        if options.topics is not None and not options.self_prompted:
            raise ValueError("expected --topics with --self_prompted, found it alone: add --self_prompted")
        if options.shard_prompts is None:
            options["shard_prompts"] = _shard_prompts(options)
        self.prompt_texts = read_prompt_texts(options.prompts)
        self.topics = read_topics(options.topics) if options.self_prompted else []
        if options.self_prompted:
            require_more_prompts(options.num_prompts, len(self.prompt_texts))
        self.reads_data = not (options.self_prompted or options.prompts)
        if not self.reads_data:  # its files need not exist, but the parser requires data of some class
            options["data"] = Namespace(class_path=NO_DATA)


def run(args: Sequence[str]) -> None:
    """Generate the missing completions, and print a configuration for training from them.

    Several processes with the same options divide the work.

    Raises:
        ValueError: an option is out of range, there is no teacher or no text, or the folder was created with other
            settings or has too little space. These are checked before generation. Also if the disk is full, or a chat
            model writes hardly any user turn.
        FileNotFoundError: a file of the configuration does not exist.
    """
    cli = parsed(PregenerateCLI, PregenerateParser, list(args), run=False, save_config_callback=None)
    options: Any = cli.config
    if not cli.reads_data:
        predictor = _require_teacher(cli.model).to(cli.trainer.strategy.root_device).eval()
        settings, prompts = _own_prompts(cli, predictor)
        row_length = 0
    else:
        data, predictor = _require_text(cli.datamodule), _require_teacher(cli.model)
        settings, prompts = _prompts_of_data(options, data, predictor)
        predictor = predictor.to(cli.trainer.strategy.root_device).eval()
        row_length = data.row_length
    with _stoppable(options.output):
        folder = CompletionFolder.create(options.output, settings)
        progress = _complete(folder, prompts, predictor, options.batch_size, "shards")
    print(_summary(folder, progress, max(row_length, max(map(len, prompts)) + settings.max_new_tokens)))


def _shard_prompts(options: Any) -> int:
    """Prompts per file of the folder that is continued; of a new one, as many as make a batch."""
    output = local_path(options.output, "--output", WRITTEN)
    for folder in (output, first_round(output)):
        if (folder / SETTINGS_FILE).is_file():
            return CompletionFolder.open(folder).settings.shard_prompts
    return max(options.batch_size // options.num_completions, 1)


def _prompts_of_data(
    options: Any, data: TextDataModule, predictor: PredictorNetwork
) -> tuple[CompletionSettings, list[list[int]]]:
    """Prompts of the training documents."""
    data.setup("fit")
    require_known_tokens(predictor, data)
    assert data.tokenizer is not None, "setup was called"
    max_prompt_tokens = max(options.prompt_tokens, data.row_length - options.max_new_tokens)
    prompts = find_prompts(data, options.num_prompts, options.prompt_tokens, max_prompt_tokens)
    ending_ids = end_of_text_ids(predictor, data.tokenizer)
    settings = _settings(options, predictor, prompts, data.end_of_text, ending_ids, data.tokenizer_path)
    require_room(predictor, max(map(len, prompts)), generation_settings(settings, []))
    return settings, prompts


def _own_prompts(cli: PregenerateCLI, predictor: PredictorNetwork) -> tuple[CompletionSettings, list[list[int]]]:
    """Prompts of files, and of user turns that the teacher writes now, as far as they are not written yet."""
    options: Any = cli.config
    tokenizer = tokenizer_of(predictor)
    is_chat = tokenizer.chat_template is not None
    ending_ids = end_of_text_ids(predictor, tokenizer, chat=is_chat)
    end_of_text: Any = tokenizer.eos_token_id

    def settings_of(prompts: list[list[int]]) -> CompletionSettings:
        path = predictor.config.backbone.path
        return _settings(options, predictor, prompts, end_of_text, ending_ids, path)

    limit = predictor.max_positions
    max_length = None if limit is None else limit - options.max_new_tokens
    prompts = prompts_of_texts(cli.prompt_texts, tokenizer, max_length)[: options.num_prompts]
    if options.self_prompted:
        require_chat_template(tokenizer, "--self_prompted")
        plan = UserTurnPlan(
            topics=cli.topics,
            num_turns=require_more_prompts(options.num_prompts, len(prompts)),
            max_tokens=options.prompt_tokens,
            seed=options.seed,
            max_prompt_length=max_length,
        )
        template = settings_of([])
        turns = replace(generation_settings(template, []), max_new_tokens=options.prompt_tokens)
        require_room(predictor, longest_opening(plan.topics, tokenizer), turns)
        with _stoppable(options.output):
            texts = write_user_turns(
                plan,
                local_path(options.output, "--output", WRITTEN),
                template,
                tokenizer,
                partial(_complete, predictor=predictor, batch_size=options.batch_size, title="user turns"),
                known=cli.prompt_texts,
            )
        prompts += [prompt_token_ids(text, tokenizer) for text in texts]
    elif not prompts or len(prompts) < (options.num_prompts or 0):
        raise ValueError(
            f"expected {options.num_prompts or 'some'} prompts of at most {max_length} tokens in --prompts, found "
            f"{len(prompts)}: lower --num_prompts, or set --prompts"
        )
    settings = settings_of(prompts)
    require_room(predictor, max(map(len, prompts)), generation_settings(settings, []))
    return settings, prompts


def _complete(
    folder: CompletionFolder, prompts: Sequence[list[int]], predictor: PredictorNetwork, batch_size: int, title: str
) -> ShardProgress:
    """Write the missing shards of a folder."""

    def sample(shard: int, on_tokens: OnTokens) -> list[Completion]:
        return sample_shard(predictor, folder.settings, prompts, shard, batch_size, on_tokens)

    _require_space(folder, max(map(len, prompts)))
    with progress_bar(folder, title) as progress:
        complete_folder(folder, sample, progress)
    return progress


@contextmanager
def _stoppable(output: str) -> Iterator[None]:
    """Says how to continue after Ctrl-C or SIGTERM, and what to do if the folder cannot be written to."""
    try:
        yield
    except OSError as error:  # no permission, no space
        raise ValueError(
            f"cannot write {output}: {error}: free space and repeat the command, which continues the run, or "
            "choose another --output"
        ) from error
    except KeyboardInterrupt as stop:
        print(f"Stopped      repeat the same command to continue in {output}", file=sys.stderr)
        sys.exit(status_of(stop))


def _require_text(data: LightningDataModule | None) -> TextDataModule:
    if not isinstance(data, TextDataModule):
        raise ValueError(
            "expected data of class CorpusDataModule or StreamingCorpus, from whose documents prompts are taken, "
            f"found {type(data).__name__}: set data"
        )
    return data


def _require_teacher(model: LightningModule) -> PredictorNetwork:
    if not isinstance(model, PredictorModule) or model.predictor.config.student.trains_base:
        raise ValueError(
            f"expected a model with a frozen teacher, DistillationModule for instance, found {type(model).__name__}, "
            "which trains its base model: set model"
        )
    predictor = model.predictor
    if predictor.config.sampling_range is not None:
        raise ValueError(
            f"expected fixed sampling settings, found predictor.sampling_range {predictor.config.sampling_range}: "
            "set it to null"
        )
    return predictor


def _settings(
    options: Any,
    predictor: PredictorNetwork,
    prompts: list[list[int]],
    end_of_text: int | None,
    ending_ids: frozenset[int],
    tokenizer: str | None,
) -> CompletionSettings:
    backbone = predictor.config.backbone
    return CompletionSettings(
        teacher=predictor.base_fingerprint,
        teacher_path=backbone.path,
        teacher_dtype=backbone.dtype,
        sampling=predictor.config.sampling,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        num_prompts=len(prompts),
        num_completions=options.num_completions,
        prompts=prompts_fingerprint(prompts),
        shard_prompts=options.shard_prompts,
        vocab_size=predictor.base_model.config.vocab_size,
        end_of_text=end_of_text,
        ending_ids=tuple(sorted(ending_ids)),
        tokenizer=tokenizer,
        greedy_fraction=options.greedy_fraction,
    )


def _require_space(folder: CompletionFolder, longest_prompt: int) -> None:
    """Check that the missing completions fit on the disk."""
    settings = folder.settings
    num_texts = sum(len(settings.prompts_of(shard)) for shard in folder.missing_shards()) * settings.num_completions
    max_bytes = num_texts * (longest_prompt + settings.max_new_tokens) * MAX_BYTES_PER_TOKEN
    free = shutil.disk_usage(folder.path).free
    if free < max_bytes:
        raise ValueError(
            f"expected space for {num_texts:,} completions in {folder.path}, at most {max_bytes:,} bytes, found "
            f"{free:,}: free space, choose another --output, or lower --num_prompts, --num_completions or "
            "--max_new_tokens"
        )


def _summary(folder: CompletionFolder, progress: ShardProgress, row_length: int) -> str:
    settings, (num_tokens, num_bytes) = folder.settings, folder.sizes()
    speed = f", {progress.num_tokens / progress.seconds:,.0f} tokens per second" if progress.num_tokens else ""
    return "\n".join(
        [
            f"Completions  {settings.num_prompts * settings.num_completions:,} of {settings.num_prompts:,} prompts, "
            f"{num_tokens:,} tokens, in {folder.path}",
            f"This process {progress.num_tokens:,} tokens in {progress.seconds:,.1f} s{speed}",
            f"Size         {num_bytes:,} bytes, {num_bytes / num_tokens * MILLION:,.0f} per million tokens",
            "Train        with these lines in a file, passed as a second --config",
            TRAINING_CONFIG.format(folder=Path(folder.path).resolve(), row_length=row_length),
        ]
    )
