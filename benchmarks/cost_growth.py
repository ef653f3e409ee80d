"""Growth of the cost of a training step with the number and length of windows, row length, vocabulary and width.

    python -m benchmarks.cost_growth --output runs/cost_growth                              one thread of a CPU
    python -m benchmarks.cost_growth --output runs/cost_growth --device cuda --windows 64 128 256 512 ...

One size grows while the others have the second of their values. The table shows slopes on a double logarithmic scale:
1 is linear, and constant costs lower a slope. Times are CPU seconds of one thread, or wall-clock seconds of the device.
Memory is the peak without the weights: of all tensors on a CPU, of the allocator on a GPU. The GEMM rate of the same
process is printed, because machines differ. Writes `cost_growth.png` and `cost_growth.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, NamedTuple

import torch

from benchmarks.training_step import MEGABYTE, NUM_WARM_UP, clock, device_name, gemm_rate, make_module, random_batch
from ptp_lightning.evaluation.memory import PeakMemory
from ptp_lightning.planning.rank_memory import replicated
from ptp_lightning.planning.step_memory import FROZEN, TRAINED, measure_step, silent_trainer

AXES = {
    "windows": ("N", [8, 16, 32, 64]),
    "window_length": ("L", [4, 8, 16, 32]),
    "row_length": ("S", [128, 256, 512, 1024]),
    "vocab": ("V", [2048, 8192, 32768]),
    "width": ("H", [64, 128, 256, 512]),
}
HEAD_SIZE = 32
LINEAR_TOLERANCE = 0.1  # of a slope from 1
DOTS_PER_INCH = 120


class Cost(NamedTuple):
    """Cost of one training step."""

    seconds: float
    megabytes: float


def main() -> None:
    """Measure, print the table, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    for axis, (symbol, values) in AXES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=values, help=symbol)
    parser.add_argument("--rows", type=int, default=2, help="B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    options.output.mkdir(parents=True, exist_ok=True)  # fails before the measurements, not after them
    rate = gemm_rate(device, getattr(torch, options.dtype))
    title = f"{device_name(device)}, {options.dtype}; {rate:.0f} GFLOP/s in a square GEMM"
    print(title)
    base = {axis: getattr(options, axis)[1] for axis in AXES}
    print("fixed sizes: " + ", ".join(f"{AXES[axis][0]} {value}" for axis, value in base.items()))
    costs: dict[str, list[Cost]] = {}
    for axis, (symbol, _) in AXES.items():
        values: list[int] = getattr(options, axis)
        costs[axis] = [measure(options, base | {axis: value}, device) for value in values]
        times, sizes = (slope(values, numbers) for numbers in zip(*costs[axis], strict=True))
        print(
            f"{symbol} {values[0]:>5} .. {values[-1]:>5}   time {times:5.2f} {classify(times):<8}"
            f"memory {sizes:5.2f} {classify(sizes):<8}"
            f"{costs[axis][-1].seconds:8.3f} s {costs[axis][-1].megabytes:8.0f} MB at the end",
            flush=True,
        )
    (options.output / "cost_growth.json").write_text(json.dumps(describe(options, rate, base, costs), default=str))
    plot(options, title, costs, options.output / "cost_growth.png")


def measure(options: argparse.Namespace, sizes: dict[str, int], device: torch.device) -> Cost:
    """Median seconds of a step, and its memory without the weights."""
    torch.manual_seed(0)
    options = argparse.Namespace(**vars(options) | sizes)
    module = make_module(network_of(options), options).to(device)
    module.end_of_text = None
    batch = random_batch(options, options.vocab, options.windows).to(device)
    seconds = []
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with silent_trainer(module), PeakMemory(device) as memory:
        configured: Any = module.configure_optimizers()
        optimizer = configured["optimizer"]
        for _ in range(NUM_WARM_UP + options.steps):
            begin = clock(device)
            loss = module.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(clock(device) - begin)
    num_bytes = memory.peak_bytes - before
    if device.type == "cpu":  # resident memory does not shrink, so it does not measure the next step
        del loss, optimizer, configured
        module.zero_grad()
        parts = replicated(measure_step(module, batch), 1).parts
        num_bytes = sum(parts.values()) - parts[FROZEN] - parts[TRAINED]
    return Cost(median(seconds[NUM_WARM_UP:]), num_bytes / MEGABYTE)


def network_of(options: argparse.Namespace) -> dict[str, Any]:
    """Configuration of a Llama of these sizes."""
    return {
        "model_type": "llama",
        "vocab_size": options.vocab,
        "hidden_size": options.width,
        "intermediate_size": 4 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.width // HEAD_SIZE),
        "max_position_embeddings": 2 * max(options.row_length, 1024),
    }


def slope(values: Sequence[int], numbers: Sequence[float]) -> float:
    """Slope of the regression line of the logarithms: k if the numbers are proportional to values ** k."""
    return linear_regression([math.log(value) for value in values], [math.log(number) for number in numbers]).slope


def classify(slope: float) -> str:
    """A slope in words.

    >>> classify(1.05), classify(0.5)
    ('linear', 'less')
    """
    if abs(slope - 1) <= LINEAR_TOLERANCE:
        return "linear"
    return "less" if slope < 1 else "more"


def describe(
    options: argparse.Namespace, rate: float, base: dict[str, int], costs: dict[str, list[Cost]]
) -> dict[str, Any]:
    """All figures."""
    growth = {}
    for axis, measured in costs.items():
        values: list[int] = getattr(options, axis)
        time_slope, memory_slope = (slope(values, numbers) for numbers in zip(*measured, strict=True))
        growth[axis] = {
            "values": values,
            "costs": [cost._asdict() for cost in measured],
            "time_slope": time_slope,
            "memory_slope": memory_slope,
        }
    return {"options": vars(options), "gemm_gflops": rate, "base": base, "growth": growth}


def plot(options: argparse.Namespace, title: str, costs: dict[str, list[Cost]], path: Path) -> None:
    """A column per size: seconds above, megabytes below, with dotted lines of linear growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(costs), 6), layout="constrained")
    panels = figure.subplots(2, len(costs), sharey="row", squeeze=False)
    figure.suptitle(title)
    for column, (axis, measured) in enumerate(costs.items()):
        values: list[int] = getattr(options, axis)
        for panel, numbers in zip(panels[:, column], zip(*measured, strict=True), strict=True):
            panel.loglog(values, numbers, "o-", color="tab:blue", label=f"slope {slope(values, numbers):.2f}")
            panel.loglog(values, [numbers[0] * value / values[0] for value in values], ":", color="tab:gray")
            panel.set_xticks(values, [str(value) for value in values])
            panel.minorticks_off()
            panel.set(xlabel=f"{axis} ({AXES[axis][0]})")
            panel.legend()
    for panel, name in zip(panels[:, 0], Cost._fields, strict=True):
        panel.set(ylabel=f"{name} per step")
    figure.savefig(path, dpi=DOTS_PER_INCH)


if __name__ == "__main__":
    main()
