"""The command `pregenerate`: a run's configuration in, completions of its teacher out, to train from."""

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

from ptp_lightning.data.completions.completions import CompletionFolder, CompletionSettings, identity_of
from ptp_lightning.data.text_datamodule import TextDataModule
from ptp_lightning.decoding.generation import OnTokens, require_room
from ptp_lightning.decoding.text import end_of_text_ids
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.pregeneration.prompts import find_prompts
from ptp_lightning.pregeneration.teacher_completions import finish, generation_settings, sample_shard
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.training.modules.predictor_module import PredictorModule, require_known_tokens

SIZES = ("num_completions", "max_new_tokens", "prompt_tokens", "num_prompts", "batch_size", "shard_prompts")
PROMPT_TOKENS_HELP = (
    "a prompt is what stands before the completion in a document (left out if no completion fits into data.row_length "
    "behind it), and of a document without prompt its beginning, so long at most"
)
NUM_PROMPTS_HELP = "null is all; fewer are taken evenly over a corpus, and from a stream the first ones"
MOST_BYTES_PER_TOKEN = 4  # shards are compressed
MILLION = 1_000_000
INTERRUPTED = 130  # exit status after Ctrl-C, as of a shell

TRAIN_FROM_IT = """\
data:
  class_path: ptp_lightning.data.CompletionsDataModule
  init_args: {{folder: {folder}, row_length: {row_length}}}
model:
  init_args:
    source:
      class_path: ptp_lightning.training.DatasetWindows"""


class PregenerateParser(PlainErrorParser):
    """Its errors point at the help of this command."""

    command = "pregenerate"


class PregenerateCLI(TrainingCLI):
    """Builds what `fit` would train, from the same configuration, and knows the options of this command."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options, and those of `fit`, which may stand in a configuration and have no meaning here."""
        add = parser.add_argument
        add("--output", type=str, required=True, help="folder of the completions; what a stopped run left there stays")
        add("--num_completions", type=int, default=1, help="of each prompt, by seeds of their own")
        add("--max_new_tokens", type=int, default=192, help="a completion ends here or at an end-of-text token")
        add("--prompt_tokens", type=int, default=64, help=PROMPT_TOKENS_HELP)
        add("--num_prompts", type=int | None, default=None, help=NUM_PROMPTS_HELP)
        add("--batch_size", type=int, default=32, help="completions side by side; they do not depend on it")
        add("--seed", type=int, default=0, help="of the seeds of all completions")
        add("--shard_prompts", type=int, default=64, help="prompts in a file, which is what a kill can lose")
        skip: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        parser.add_method_arguments(Trainer, "fit", skip=skip)

    def before_instantiate_classes(self) -> None:
        """Refuse sizes before a model is loaded."""
        for name in SIZES:
            value: int | None = self.config[name]
            if value is not None and value < 1:
                raise ValueError(f"expected --{name} >= 1, found {value}")


def run(args: Sequence[str]) -> None:
    """Let the teacher complete the prompts that are not completed yet, and say how to train from it.

    Several processes with the same options share the work.

    Raises:
        ValueError: an option is out of range, there is no teacher or no text, the folder was begun with other
            settings or has no room, all before the first token; or the disk is full meanwhile.
        FileNotFoundError: a file of the configuration is not there.
    """
    cli = parsed(PregenerateCLI, PregenerateParser, list(args), run=False, save_config_callback=None)
    options: Any = cli.config
    data, predictor = _require_text(cli.datamodule), _require_teacher(cli.model)
    data.setup("fit")
    require_known_tokens(predictor, data)
    room = max(options.prompt_tokens, data.row_length - options.max_new_tokens)
    prompts = find_prompts(data, options.num_prompts, options.prompt_tokens, room)
    settings = _settings(options, data, predictor, prompts)
    longest = max(map(len, prompts))
    require_room(predictor, longest, generation_settings(settings, []))
    predictor = predictor.to(cli.trainer.strategy.root_device).eval()

    def make(shard: int, on_tokens: OnTokens) -> Any:
        return sample_shard(predictor, settings, prompts, shard, options.batch_size, on_tokens)

    try:
        folder = CompletionFolder.begin(options.output, settings)
        _require_space(folder, longest)
        with _shown(folder) as progress:
            finish(folder, make, progress)
    except OSError as error:  # no permission, no space
        raise ValueError(
            f"cannot write {options.output}: {error}: make room and repeat the command, which goes on where it was, or "
            "choose another --output"
        ) from error
    except KeyboardInterrupt:
        print(f"Stopped      the same command goes on in {options.output}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(_closing_words(folder, progress, max(data.row_length, longest + settings.max_new_tokens)))


def _require_text(data: LightningDataModule | None) -> TextDataModule:
    if not isinstance(data, TextDataModule):
        raise ValueError(
            "expected data of class CorpusDataModule or StreamingCorpus, whose documents give the prompts, found "
            f"{type(data).__name__}: set data"
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
            f"expected one setting to sample with, found predictor.sampling_range {predictor.config.sampling_range}: "
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
        prompts=identity_of(prompts),
        shard_prompts=options.shard_prompts,
        vocab_size=predictor.base_model.config.vocab_size,
        end_of_text=data.end_of_text,
        ending_ids=tuple(sorted(end_of_text_ids(predictor, data.tokenizer))),
        tokenizer=data.tokenizer_path,
    )


def _require_space(folder: CompletionFolder, longest_prompt: int) -> None:
    """Refuse to begin what may not find room."""
    settings = folder.settings
    num_texts = sum(len(settings.prompts_of(shard)) for shard in folder.missing()) * settings.num_completions
    most = num_texts * (longest_prompt + settings.max_new_tokens) * MOST_BYTES_PER_TOKEN
    free = shutil.disk_usage(folder.path).free
    if free < most:
        raise ValueError(
            f"expected room for {num_texts:,} completions in {folder.path}, {most:,} bytes at most, found {free:,}: "
            "make room, choose another --output, or lower --num_prompts, --num_completions or --max_new_tokens"
        )


class _Progress:
    """A bar of the shards of all processes, moved by the tokens of this one as well.

    Attributes:
        num_tokens: that this process has sampled.
        seconds: since it began.
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
        """Since it began."""
        return time.perf_counter() - self._begin

    def look(self, num_finished: int) -> None:
        """See `Watcher.look`."""
        self._finished, self._in_shard = num_finished, 0
        if self._task is None:  # what was there before says nothing about speed
            self._task = self._bar.add_task("", total=self._settings.num_shards, completed=num_finished)
        self._show()

    def count(self, num_tokens: int) -> None:
        """See `Watcher.count`."""
        self.num_tokens += num_tokens
        self._in_shard += num_tokens
        self._show()

    def _show(self) -> None:
        settings = self._settings
        of_shard = settings.shard_prompts * settings.num_completions * settings.max_new_tokens
        completed = min(self._finished + self._in_shard / of_shard, settings.num_shards)
        self._bar.update(self._task, completed=completed, description=f"{self.num_tokens / self.seconds:,.0f} tokens/s")


@contextmanager
def _shown(folder: CompletionFolder) -> Iterator[_Progress]:
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


def _closing_words(folder: CompletionFolder, progress: _Progress, row_length: int) -> str:
    settings, (num_tokens, num_bytes) = folder.settings, folder.sizes()
    speed = f", {progress.num_tokens / progress.seconds:,.0f} tokens per second" if progress.num_tokens else ""
    return "\n".join(
        [
            f"Completions  {settings.num_prompts * settings.num_completions:,} of {settings.num_prompts:,} prompts, "
            f"{num_tokens:,} tokens, in {folder.path}",
            f"This process {progress.num_tokens:,} tokens in {progress.seconds:,.1f} s{speed}",
            f"Size         {num_bytes:,} bytes, {num_bytes / num_tokens * MILLION:,.0f} per million tokens",
            "Train        with these lines in a file that follows as a second --config",
            TRAIN_FROM_IT.format(folder=Path(folder.path).resolve(), row_length=row_length),
        ]
    )
