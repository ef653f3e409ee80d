"""The command `pregenerate`: generates completions with the teacher of a configuration, to train from them later."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from ptp_lightning.data.completions.completions import CompletionFolder, CompletionSettings, prompts_fingerprint
from ptp_lightning.data.text_datamodule import TextDataModule
from ptp_lightning.decoding.generation import OnTokens, require_room
from ptp_lightning.decoding.text import end_of_text_ids
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.pregeneration.prompts import find_prompts
from ptp_lightning.pregeneration.teacher_completions import complete_folder, generation_settings, sample_shard
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.training.modules.predictor_module import PredictorModule, require_known_tokens

SIZES = ("num_completions", "max_new_tokens", "prompt_tokens", "num_prompts", "batch_size", "shard_prompts")
PROMPT_TOKENS_HELP = (
    "prompts are the prompts of documents (skipped if no completion fits into data.row_length after them); for a "
    "document without a prompt, its first tokens, at most this many"
)
NUM_PROMPTS_HELP = "null is all; otherwise evenly spaced over a corpus, or the first ones of a stream"
MAX_BYTES_PER_TOKEN = 4  # before compression
MILLION = 1_000_000
INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell

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
        add = parser.add_argument
        add("--output", type=str, required=True, help="folder of the completions; a stopped run is continued")
        add("--num_completions", type=int, default=1, help="completions per prompt, with different seeds")
        add("--max_new_tokens", type=int, default=192, help="maximum length of a completion")
        add("--prompt_tokens", type=int, default=64, help=PROMPT_TOKENS_HELP)
        add("--num_prompts", type=int | None, default=None, help=NUM_PROMPTS_HELP)
        add("--batch_size", type=int, default=32, help="completions generated in parallel; has no effect on them")
        add("--seed", type=int, default=0, help="from which the seeds of all completions are derived")
        add("--shard_prompts", type=int, default=64, help="prompts per file; a killed run loses at most one file")
        skip: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        parser.add_method_arguments(Trainer, "fit", skip=skip)

    def before_instantiate_classes(self) -> None:
        """Check the options before a model is loaded."""
        for name in SIZES:
            value: int | None = self.config[name]
            if value is not None and value < 1:
                raise ValueError(f"expected --{name} >= 1, found {value}")


def run(args: Sequence[str]) -> None:
    """Generate the missing completions, and print a configuration for training from them.

    Several processes with the same options divide the work.

    Raises:
        ValueError: an option is out of range, there is no teacher or no text, or the folder was created with other
            settings or has too little space. These are checked before generation. Also if the disk is full.
        FileNotFoundError: a file of the configuration does not exist.
    """
    cli = parsed(PregenerateCLI, PregenerateParser, list(args), run=False, save_config_callback=None)
    options: Any = cli.config
    data, predictor = _require_text(cli.datamodule), _require_teacher(cli.model)
    data.setup("fit")
    require_known_tokens(predictor, data)
    max_prompt_tokens = max(options.prompt_tokens, data.row_length - options.max_new_tokens)
    prompts = find_prompts(data, options.num_prompts, options.prompt_tokens, max_prompt_tokens)
    settings = _settings(options, data, predictor, prompts)
    longest = max(map(len, prompts))
    require_room(predictor, longest, generation_settings(settings, []))
    predictor = predictor.to(cli.trainer.strategy.root_device).eval()

    def sample(shard: int, on_tokens: OnTokens) -> Any:
        return sample_shard(predictor, settings, prompts, shard, options.batch_size, on_tokens)

    try:
        folder = CompletionFolder.create(options.output, settings)
        _require_space(folder, longest)
        with _progress_bar(folder) as progress:
            complete_folder(folder, sample, progress)
    except OSError as error:  # no permission, no space
        raise ValueError(
            f"cannot write {options.output}: {error}: free space and repeat the command, which continues the run, or "
            "choose another --output"
        ) from error
    except KeyboardInterrupt:
        print(f"Stopped      repeat the same command to continue in {options.output}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(_summary(folder, progress, max(data.row_length, longest + settings.max_new_tokens)))


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
    options: Any, data: TextDataModule, predictor: PredictorNetwork, prompts: list[list[int]]
) -> CompletionSettings:
    assert data.tokenizer is not None, "setup was called"
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
        end_of_text=data.end_of_text,
        ending_ids=tuple(sorted(end_of_text_ids(predictor, data.tokenizer))),
        tokenizer=data.tokenizer_path,
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


class _Progress:
    """A progress bar of the shards of all processes and of the tokens of this process.

    Attributes:
        num_tokens: sampled by this process.
        seconds: since the start.
    """

    def __init__(self, bar: Any, settings: CompletionSettings) -> None:
        self.num_tokens = 0
        self._bar = bar
        self._settings = settings
        self._finished = 0
        self._in_shard = 0
        self._begin = time.perf_counter()
        self._task: Any = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._begin

    def on_shards(self, num_finished: int) -> None:
        """See `ProgressListener.on_shards`."""
        self._finished, self._in_shard = num_finished, 0
        if self._task is None:  # earlier shards must not count for the speed
            self._task = self._bar.add_task("", total=self._settings.num_shards, completed=num_finished)
        self._update()

    def on_tokens(self, num_tokens: int) -> None:
        """See `ProgressListener.on_tokens`."""
        self.num_tokens += num_tokens
        self._in_shard += num_tokens
        self._update()

    def _update(self) -> None:
        settings = self._settings
        tokens_per_shard = settings.shard_prompts * settings.num_completions * settings.max_new_tokens
        completed = min(self._finished + self._in_shard / tokens_per_shard, settings.num_shards)
        self._bar.update(self._task, completed=completed, description=f"{self.num_tokens / self.seconds:,.0f} tokens/s")


@contextmanager
def _progress_bar(folder: CompletionFolder) -> Iterator[_Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Progress(bar, folder.settings)


def _summary(folder: CompletionFolder, progress: _Progress, row_length: int) -> str:
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
