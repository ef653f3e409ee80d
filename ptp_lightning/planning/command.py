"""The command `plan`: a run's configuration in, the memory of its training step out, before anything is loaded.

It measures and models nothing: the module of the configuration is built without memory, and one real training step
with its optimiser, and a validation step, run on tensors that have shapes only, in full depth and width (see
`ptp_lightning.planning.fake_tensors`), while the bytes of all tensors that live are counted. So the estimate follows
the code as it changes. Extrapolating from a few layers would save seconds and stumble over whatever names a layer.

A step that does not fit is measured again with one thing lowered, for each that can be.

Not in it: what kernels need for themselves, the CUDA context and the gaps of the allocator; `USABLE` leaves room for
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.planning.fake_tensors import building, running
from ptp_lightning.planning.rank_memory import ROWS, RankMemory, layer_groups, replicated, sharded
from ptp_lightning.planning.step_memory import StepMemory, measure_step
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.training.modules.predictor_module import PredictorModule
from ptp_lightning.training.modules.training_module import TrainingModule

USABLE = 0.9  # share of a GPU's memory that a step may fill
GIGABYTE = 1e9
UNITS = {"MB": 1e6, "GB": 1e9, "GIB": 2**30}
LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
BACKBONES: dict[str, dict[str, Any]] = {
    "1b": LLAMA  # TinyLlama
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": LLAMA  # Llama 2, Vicuna
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": LLAMA  # Llama 2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
BACKBONE_KEYS = ("model.init_args.predictor.backbone", "model.init_args.backbone")
ORDER_KEY = "model.init_args.predictor.sampling.order"
COMPILE_KEY = "model.init_args.compile"
# What can be lowered, by which factor, and the least that it can be.
SAVINGS = {
    "data.init_args.batch_size": (2, 1),
    "data.init_args.num_windows": (2, 1),
    "model.init_args.predictor.window_length": (2, 2),
    "model.init_args.loss.init_args.chunk_size": (4, 1),
}
CHECKPOINTING_KEY = "model.init_args.activation_checkpointing"
DTYPE_KEY = "model.init_args.predictor.backbone.dtype"
WIDTH = 56


class PlanParser(PlainErrorParser):
    """Its errors point at the help of this command."""

    command = "plan"


class PlanCLI(TrainingCLI):
    """Builds what `fit` would train, from the same configuration but without memory, and no trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options, and those of `fit`, which may stand in a configuration and have no meaning here."""
        add = parser.add_argument
        add("--gpus", type=int | None, default=None, help="of the run; null takes trainer.devices and num_nodes")
        add("--memory", type=str | None, default=None, help="of one GPU, 80GB for instance: does the step fit?")
        add("--backbone", type=str | None, default=None, help=f"in the place of predictor.backbone: {_choices()}")
        add("--json", action="store_true", help="print one JSON object, in bytes")
        skip: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        parser.add_method_arguments(Trainer, "fit", skip=skip)

    def before_instantiate_classes(self) -> None:
        """Refuse options; let the model be built from its configuration alone."""
        config = self.config
        if config["gpus"] is not None and config["gpus"] < 1:
            raise ValueError(f"expected --gpus >= 1, found {config['gpus']}")
        if config["backbone"] is not None and config["backbone"] not in BACKBONES:
            raise ValueError(f"expected --backbone {_choices()}, found {config['backbone']!r}")
        _num_bytes(config["memory"])
        for key in BACKBONE_KEYS:
            if key not in config:
                continue
            if config["backbone"] is not None:
                config[f"{key}.from_config"] = BACKBONES[config["backbone"]]
            config[f"{key}.random_weights"] = config[f"{key}.from_config"] is None
        if config.get(ORDER_KEY) == "embedding":  # its table comes from the weights' values, and is small
            config[ORDER_KEY] = "vocabulary"
        if config.get(COMPILE_KEY):
            config[COMPILE_KEY] = False

    def instantiate_classes(self) -> None:
        """Model and data without memory."""
        with building():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: the machine that plans need not have the devices of the run."""
        return None


@dataclass(frozen=True)
class Layouts:
    """The memory of one GPU of several, by the way the model is laid out over them.

    Attributes:
        columns: `replicated` and, of several GPUs, `sharded`.
        step: what was measured.
    """

    columns: dict[str, RankMemory]
    step: StepMemory

    @property
    def totals(self) -> list[int]:
        """Bytes of every column."""
        return [memory.total for memory in self.columns.values()]


def run(args: Sequence[str]) -> None:
    """Estimate the memory of a training step, and say whether it fits.

    Raises:
        ValueError: an option is out of range or the configuration is not one that `fit` takes.
        FileNotFoundError: a file of the configuration is not there.
    """
    cli = _parsed(args)
    num_ranks = cli.config["gpus"] or _num_ranks(cli.config["trainer"])
    layouts = _measure(cli, num_ranks)
    room = _num_bytes(cli.config["memory"])
    lowered: dict[str, Layouts] = {}
    if not cli.config["json"]:
        print("\n".join([*_table(cli, layouts, num_ranks), *_verdict(layouts, room)]), flush=True)
    if room is not None and max(layouts.totals) > USABLE * room:
        for name, override in _savings(cli.config).items():
            lowered[name] = _measure(_parsed([*args, override]), num_ranks)
            if not cli.config["json"]:  # one after the other, for a large model takes its time
                print(_row(name, lowered[name].totals), flush=True)
    if cli.config["json"]:
        print(json.dumps(_plain(layouts, lowered, num_ranks, room)))


def _parsed(args: Sequence[str]) -> PlanCLI:
    return parsed(PlanCLI, PlanParser, list(args), run=False, save_config_callback=None)


def _measure(cli: PlanCLI, num_ranks: int) -> Layouts:
    """Run the step of a parsed configuration."""
    module, data, trainer = cli.model, cli.datamodule, cli.config["trainer"]
    if not isinstance(data, PackedDataModule):
        raise ValueError(f"expected data in packed rows, found {type(data).__name__}: set data")
    plugin = _precision(str(trainer["precision"] or "32-true"))
    with building():
        module = plugin.convert_module(module)
    assert isinstance(module, TrainingModule), "all modules of this package are"
    validates = isinstance(module, PredictorModule)  # others keep less than in training
    if validates:
        module.end_of_text = None
    on_gpu = trainer["accelerator"] != "cpu"
    with running(module, on_gpu=on_gpu):
        step = measure_step(
            module,
            full_batch(data),
            plugin.train_step_context,
            on_gpu=on_gpu,
            validates=validates,
            accumulates=trainer["accumulate_grad_batches"] > 1,
        )
    columns = {"replicated": replicated(step, num_ranks)}
    if num_ranks > 1:
        columns["sharded"] = sharded(step, layer_groups(module), num_ranks)
    return Layouts(columns, step)


def full_batch(data: Any) -> PackedBatch:
    """Rows without padding, each of one document, every window in it whole."""
    shape = (data.batch_size, data.row_length)
    return PackedBatch(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        document_ids=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.arange(data.row_length).expand(shape).contiguous(),
        window_starts=torch.ones(data.batch_size, data.num_windows, dtype=torch.int64),
        completion_mask=torch.ones(shape, dtype=torch.bool),
    )


def _precision(name: str) -> Precision:
    """Lightning's own, which decides about autocast and the weights' type, on a CPU."""
    if name in ("16-mixed", "bf16-mixed", "16", "bf16"):  # float16 takes as much as bfloat16
        return MixedPrecision("bf16-mixed", "cpu")
    if name in ("16-true", "bf16-true"):
        return HalfPrecision("bf16-true")
    if name in ("64", "64-true"):
        return DoublePrecision()
    if name in ("32", "32-true"):
        return Precision()
    raise ValueError(f"expected trainer.precision 32-true, bf16-mixed or bf16-true, found {name}")


def _num_ranks(trainer: Namespace) -> int:
    """GPUs of a run as its configuration has them; 1 where they are found when it starts."""
    devices: Any = trainer["devices"]
    if isinstance(devices, list):
        count = len(devices)
    else:
        count = int(devices) if str(devices).isdecimal() else 1
    return max(count, 1) * trainer["num_nodes"]


def _num_bytes(memory: str | None) -> float | None:
    """`80GB` in bytes."""
    if memory is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|GIB)", memory.strip().upper())
    if found is None:
        raise ValueError(f"expected --memory such as 80GB, found {memory!r}")
    return float(found[1]) * UNITS[found[2]]


def _savings(config: Namespace) -> dict[str, str]:
    """What can be lowered, as it is written in a configuration, and the option of the command line that does it."""
    savings = {}
    for key, (divisor, least) in SAVINGS.items():
        value: int | None = config.get(key)
        if value is not None and value // divisor >= least:
            savings[f"{_short(key)}: {value // divisor} instead of {value}"] = f"--{key}={value // divisor}"
    if config.get(CHECKPOINTING_KEY) is False:
        savings[f"{_short(CHECKPOINTING_KEY)}: true"] = f"--{CHECKPOINTING_KEY}=true"
    if config.get(DTYPE_KEY) == "float32":
        savings[f"{_short(DTYPE_KEY)}: bfloat16 instead of float32"] = f"--{DTYPE_KEY}=bfloat16"
    return savings


def _short(key: str) -> str:
    return key.replace(".init_args", "").removeprefix("model.")


def _table(cli: PlanCLI, layouts: Layouts, num_ranks: int) -> list[str]:
    parameters = list(cli.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    data: Any = cli.datamodule
    columns = layouts.columns.values()
    names = [name for name in ROWS if any(name in memory.parts for memory in columns)]
    whose = "the GPU" if num_ranks == 1 else f"each of {num_ranks} GPUs"
    return [
        f"Model        {sum(parameter.numel() for parameter in parameters):,} parameters, {trained:,} of them trained",
        f"Batch        {data.batch_size} rows of {data.row_length}, {data.num_windows} windows in each; "
        f"{cli.config['trainer']['precision'] or '32-true'}",
        "",
        f"{'GB on ' + whose:<{WIDTH}}" + "".join(f"{name:>12}" for name in layouts.columns),
        *(_row(name, [memory.parts.get(name) for memory in columns]) for name in names),
        _row("total", layouts.totals),
    ]


def _row(name: str, values: Sequence[int | None]) -> str:
    return f"{name:<{WIDTH}}" + "".join(f"{'' if v is None else format(v / GIGABYTE, '.2f'):>12}" for v in values)


def _verdict(layouts: Layouts, room: float | None) -> list[str]:
    if room is None:
        return []
    words = [f"{name} {'yes' if memory.total <= USABLE * room else 'no'}" for name, memory in layouts.columns.items()]
    verdict = ["", f"Fits         {', '.join(words)} (in {USABLE:.0%} of {room / GIGABYTE:,.1f} GB)"]
    return verdict if max(layouts.totals) <= USABLE * room else [*verdict, "", "total with"]


def _plain(layouts: Layouts, lowered: dict[str, Layouts], num_ranks: int, room: float | None) -> dict[str, Any]:
    def plain(entry: Layouts) -> dict[str, Any]:
        return {name: memory.parts | {"total": memory.total} for name, memory in entry.columns.items()}

    fits = None
    if room is not None:
        fits = {name: memory.total <= USABLE * room for name, memory in layouts.columns.items()}
    return {
        "gpus": num_ranks,
        "bytes": plain(layouts),
        "fits": fits,
        "lowered": {name: plain(entry) for name, entry in lowered.items()},
    }


def _choices() -> str:
    return ", ".join(BACKBONES)
