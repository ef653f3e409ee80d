"""The command `plan`: the memory of a training step of a configuration, before anything is loaded.

The memory is measured, not modelled. The module of the configuration is built without memory, in full depth and width.
A real training step with its optimizer, and a validation step, run on fake tensors (see
`ptp_lightning.planning.fake_tensors`) while the bytes of all live tensors are counted. So the estimate follows changes
of the code.

A step that does not fit is measured again for each setting that can be lowered.

Not included are workspaces of kernels, the CUDA context and fragmentation of the allocator; `USABLE` allows for them.
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
from ptp_lightning.planning.backbones import BACKBONES
from ptp_lightning.planning.fake_tensors import fake_execution, meta_modules
from ptp_lightning.planning.options import add_plan_options
from ptp_lightning.planning.rank_memory import ROWS, RankMemory, layer_groups, replicated, sharded
from ptp_lightning.planning.step_memory import StepMemory, measure_step
from ptp_lightning.training.cli import PlainErrorParser, TrainingCLI, parsed
from ptp_lightning.training.modules.predictor_module import PredictorModule
from ptp_lightning.training.modules.training_module import TrainingModule

USABLE = 0.9  # fraction of a GPU's memory that a step may use
GIGABYTE = 1e9
UNITS = {"MB": 1e6, "GB": 1e9, "GIB": 2**30}
BACKBONE_KEYS = ("model.init_args.predictor.backbone", "model.init_args.backbone")
ORDER_KEY = "model.init_args.predictor.sampling.order"
COMPILE_KEY = "model.init_args.compile"
# Settings that can be lowered: divisor and minimum.
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
    """Errors refer to the help of this command."""

    command = "plan"


class PlanCLI(TrainingCLI):
    """Builds the model and data that `fit` would train, without memory and without a trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command, and those of `fit`, which are ignored."""
        add_plan_options(parser)
        skip: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        parser.add_method_arguments(Trainer, "fit", skip=skip)

    def before_instantiate_classes(self) -> None:
        """Check the options; set the backbone to be built from its configuration alone."""
        config = self.config
        if config["gpus"] is not None and config["gpus"] < 1:
            raise ValueError(f"expected --gpus >= 1, found {config['gpus']}")
        if config["backbone"] is not None and config["backbone"] not in BACKBONES:
            raise ValueError(f"expected --backbone {', '.join(BACKBONES)}, found {config['backbone']!r}")
        _num_bytes(config["memory"])
        for key in BACKBONE_KEYS:
            if key not in config:
                continue
            if config["backbone"] is not None:
                config[f"{key}.from_config"] = BACKBONES[config["backbone"]]
            config[f"{key}.random_weights"] = config[f"{key}.from_config"] is None
        if config.get(ORDER_KEY) == "embedding":  # its table depends on the values of weights, and is small
            config[ORDER_KEY] = "vocabulary"
        if config.get(COMPILE_KEY):
            config[COMPILE_KEY] = False

    def instantiate_classes(self) -> None:
        """Create the model and data without memory."""
        with meta_modules():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: this machine need not have the devices of the run."""
        return None


@dataclass(frozen=True)
class Layouts:
    """The memory of each GPU, by the layout of the model over the GPUs.

    Attributes:
        columns: `replicated` and, for several GPUs, `sharded`.
        step: the measured step.
    """

    columns: dict[str, RankMemory]
    step: StepMemory

    @property
    def totals(self) -> list[int]:
        """Total bytes of each column."""
        return [memory.total for memory in self.columns.values()]


def run(args: Sequence[str]) -> None:
    """Estimate the memory of a training step, and print whether it fits.

    Raises:
        ValueError: an option is out of range, or the configuration is not valid for `fit`.
        FileNotFoundError: a file of the configuration does not exist.
    """
    cli = _parsed(args)
    num_ranks = cli.config["gpus"] or _num_ranks(cli.config["trainer"])
    layouts = _measure(cli, num_ranks)
    available = _num_bytes(cli.config["memory"])
    lowered: dict[str, Layouts] = {}
    if not cli.config["json"]:
        print("\n".join([*_table(cli, layouts, num_ranks), *_verdict(layouts, available)]), flush=True)
    if available is not None and max(layouts.totals) > USABLE * available:
        for name, override in _savings(cli.config).items():
            lowered[name] = _measure(_parsed([*args, override]), num_ranks)
            if not cli.config["json"]:  # printed one by one, because a large model takes some time
                print(_row(name, lowered[name].totals), flush=True)
    if cli.config["json"]:
        print(json.dumps(_plain(layouts, lowered, num_ranks, available)))


def _parsed(args: Sequence[str]) -> PlanCLI:
    return parsed(PlanCLI, PlanParser, list(args), run=False, save_config_callback=None)


def _measure(cli: PlanCLI, num_ranks: int) -> Layouts:
    """Measure the step of a parsed configuration."""
    module, data, trainer = cli.model, cli.datamodule, cli.config["trainer"]
    if not isinstance(data, PackedDataModule):
        raise ValueError(f"expected a data module of packed rows, found {type(data).__name__}: set data")
    plugin = _precision(str(trainer["precision"] or "32-true"))
    with meta_modules():
        module = plugin.convert_module(module)
    assert isinstance(module, TrainingModule), "all modules of this package are TrainingModules"
    validates = isinstance(module, PredictorModule)  # the validation of others needs less than training
    if validates:
        module.end_of_text = None
    on_gpu = trainer["accelerator"] != "cpu"
    with fake_execution(module, on_gpu=on_gpu):
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
    """Rows without padding, one document each, with complete windows."""
    shape = (data.batch_size, data.row_length)
    return PackedBatch(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        document_ids=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.arange(data.row_length).expand(shape).contiguous(),
        window_starts=torch.ones(data.batch_size, data.num_windows, dtype=torch.int64),
        completion_mask=torch.ones(shape, dtype=torch.bool),
    )


def _precision(name: str) -> Precision:
    """Lightning's precision plugin for a CPU, which determines autocast and the dtype of weights."""
    if name in ("16-mixed", "bf16-mixed", "16", "bf16"):  # float16 needs as much memory as bfloat16
        return MixedPrecision("bf16-mixed", "cpu")
    if name in ("16-true", "bf16-true"):
        return HalfPrecision("bf16-true")
    if name in ("64", "64-true"):
        return DoublePrecision()
    if name in ("32", "32-true"):
        return Precision()
    raise ValueError(
        f"expected trainer.precision 32-true, bf16-mixed or bf16-true, found {name}: set trainer.precision"
    )


def _num_ranks(trainer: Namespace) -> int:
    """Number of GPUs in the configuration; 1 if the run determines it at its start."""
    devices: Any = trainer["devices"]
    if isinstance(devices, list):
        count = len(devices)
    else:
        count = int(devices) if str(devices).isdecimal() else 1
    return max(count, 1) * trainer["num_nodes"]


def _num_bytes(memory: str | None) -> float | None:
    """The bytes of a text such as `80GB`.

    >>> _num_bytes("80GB")
    80000000000.0
    """
    if memory is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|GIB)", memory.strip().upper())
    if found is None:
        raise ValueError(f"expected --memory such as 80GB, found {memory!r}")
    return float(found[1]) * UNITS[found[2]]


def _savings(config: Namespace) -> dict[str, str]:
    """Settings that can be lowered, as text, and the command line options that lower them."""
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


def _verdict(layouts: Layouts, available: float | None) -> list[str]:
    if available is None:
        return []
    words = [
        f"{name} {'yes' if memory.total <= USABLE * available else 'no'}" for name, memory in layouts.columns.items()
    ]
    verdict = ["", f"Fits         {', '.join(words)} (in {USABLE:.0%} of {available / GIGABYTE:,.1f} GB)"]
    return verdict if max(layouts.totals) <= USABLE * available else [*verdict, "", "total with"]


def _plain(layouts: Layouts, lowered: dict[str, Layouts], num_ranks: int, available: float | None) -> dict[str, Any]:
    def plain(entry: Layouts) -> dict[str, Any]:
        return {name: memory.parts | {"total": memory.total} for name, memory in entry.columns.items()}

    fits = None
    if available is not None:
        fits = {name: memory.total <= USABLE * available for name, memory in layouts.columns.items()}
    return {
        "gpus": num_ranks,
        "bytes": plain(layouts),
        "fits": fits,
        "lowered": {name: plain(entry) for name, entry in lowered.items()},
    }
