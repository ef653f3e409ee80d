"""Cost of a training step: forward, backward and AdamW of a Llama with gated LoRA on all linear layers.

    python -m benchmarks.training_step [--vocab 2048 32000] [--windows 16 64]              one thread of a CPU
    python -m benchmarks.training_step --device cuda --dtype bfloat16 --model 1.1b

On a CPU, times are CPU seconds of one thread, and memory is the peak of resident memory above the start. On a GPU, they
are wall-clock seconds and the peak of the allocator. Also printed are the GEMM rate of the same process, because
machines differ, and the fraction of it that the required operations of a step reach (`required_operations`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import psutil
import torch

from ptp_lightning.batch import PackedBatch
from ptp_lightning.evaluation.memory import PeakMemory
from ptp_lightning.losses import CrossEntropy
from ptp_lightning.models import (
    BackboneSettings,
    LoraSettings,
    OneHotObjective,
    PredictorConfig,
)
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.dense import Dense
from ptp_lightning.models.layers.compile import compile_layers
from ptp_lightning.planning.backbones import BACKBONES, LLAMA
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training import DatasetWindows, DistillationModule
from ptp_lightning.utils.randomness import keyed_generator


def four_layers(width: int) -> dict[str, Any]:
    """A Llama of four layers with heads of size 64."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 64,
    }


MODELS: dict[str, dict[str, Any]] = {
    "small": four_layers(256),
    "small-512": four_layers(512),
    "small-1024": four_layers(1024),
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1.1b": BACKBONES["1b"],
}
NUM_WARM_UP = 2
MEGABYTE = 1e6
MICROSECONDS_PER_SECOND = 1e6
GIGA = 1e9
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0} | dict.fromkeys(
    ("aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_"), 1
)
"""Matrix products, and the index of the argument that is the left factor."""


def parse_options(args: list[str] | None = None) -> argparse.Namespace:
    """Options, by default from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 32000])
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows", type=int, default=4, help="B")
    parser.add_argument("--row_length", type=int, default=256, help="S")
    parser.add_argument("--window_length", type=int, default=16, help="L")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--dense", action="store_true", help="use dense attention with one mask for all windows of a row"
    )
    parser.add_argument("--compile", action="store_true", help="see configs/strategy/compile.yaml")
    parser.add_argument("--profile", action="store_true", help="print a profile of the operations instead")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(args)


def main() -> None:
    """Measure, and print a row for each vocabulary and number of windows."""
    options = parse_options()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if options.profile:
        for vocab, windows in itertools.product(options.vocab, options.windows):
            profile(options, vocab, windows, device)
        return
    rate = gemm_rate(device, getattr(torch, options.dtype))
    print(f"{options.model} on {device_name(device)}, {options.dtype}; {rate:.0f} GFLOP/s in a square GEMM")
    rows = []
    # Each in a new process, because the heap of a process does not shrink.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as executor:
        for vocab, windows in itertools.product(options.vocab, options.windows):
            row = {"vocab": vocab, "windows": windows}
            row |= executor.submit(measure, options, vocab, windows, device).result()
            row["fraction"] = required_operations(options, vocab, windows) / GIGA / row["possible_gigaflop"]
            rows.append(row)
            print(
                "V {vocab:>6}  N {windows:>3}  {seconds:8.3f} s per step  {megabytes:8.0f} MB  "
                "{fraction:4.0%} of the GEMM rate, {gemm_gflops:.0f} GFLOP/s".format(**row),
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options), "gemm_gflops": rate, "rows": rows}, default=str))


def measure(
    options: argparse.Namespace,
    vocab: int,
    windows: int,
    device: torch.device,
    module: DistillationModule | None = None,
) -> dict[str, float]:
    """Time and memory of a step.

    Args:
        options: see `parse_options`.
        vocab: V.
        windows: N.
        device: of the model.
        module: created by `build` for these options; by default a new one.

    Returns:
        seconds: median per step.
        megabytes: peak memory above that before the steps.
        gemm_gflops: GEMM rate in GFLOP/s; on a CPU the median of the rates before each step, because the speed of a
            machine changes.
        possible_gigaflop: median of a step's seconds times the GEMM rate before it.
    """
    module = build(options, vocab, device) if module is None else module
    attention = module.predictor.attention
    if options.dense:
        module.predictor.attention = AttentionChoice(module.predictor.base_model, [Dense()])
    step = make_step(module, options, vocab, windows, device)
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    rate_before = gemm_rate(device, dtype)
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    with PeakMemory(device) as memory:
        # On a GPU the matrices of the GEMM would count as memory of the step.
        timing = time_steps(
            step, options.steps, device, lambda: gemm_rate(device, dtype) if device.type == "cpu" else rate_before
        )
    module.predictor.attention = attention
    return timing | {"megabytes": (memory.peak_bytes - before) / MEGABYTE}


def time_steps(
    step: Callable[[int], None], num_steps: int, device: torch.device, gemm_rate_now: Callable[[], float]
) -> dict[str, float]:
    """The entries of `measure` about time, after warm-up steps."""
    seconds, rates = [], []
    for number in range(NUM_WARM_UP + num_steps):
        rates.append(gemm_rate_now())
        begin = clock(device)
        step(number)
        seconds.append(clock(device) - begin)
    seconds, rates = seconds[NUM_WARM_UP:], rates[NUM_WARM_UP:]
    return {
        "seconds": median(seconds),
        "gemm_gflops": median(rates),
        "possible_gigaflop": median(second * rate for second, rate in zip(seconds, rates, strict=True)),
    }


def make_step(
    module: DistillationModule, options: argparse.Namespace, vocab: int, windows: int, device: torch.device
) -> Callable[[int], None]:
    """A training step, called with its number."""
    trained = [parameter for parameter in module.predictor.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    torch.manual_seed(1)
    batch = random_batch(options, vocab, windows).to(device)

    def step(number: int) -> None:
        predictor = module.predictor
        context = predictor.encode(batch)
        sample = module.source.sample(predictor, context, keyed_generator(number))
        hidden = predictor.slot_hidden(context, sample.auxiliaries, sample.token_ids[..., 0])
        loss = module._first_pass_loss(context, hidden, sample)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def profile(options: argparse.Namespace, vocab: int, windows: int, device: torch.device) -> None:
    """Print the CPU time of the operations of a step, and the rate and the required fraction of matrix products."""
    torch.set_num_threads(1)
    step = make_step(build(options, vocab, device), options, vocab, windows, device)
    for number in range(NUM_WARM_UP):
        step(number)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiled:
        step(NUM_WARM_UP)
    operations = profiled.key_averages()
    print(operations.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
    products = [event for event in profiled.key_averages(group_by_input_shape=True) if event.key in PRODUCTS]
    # Products that only call another listed product are skipped.
    products = [event for event in products if event.self_cpu_time_total > event.cpu_time_total / 2]
    micros = sum(event.self_cpu_time_total for event in products)
    fraction = micros / sum(event.self_cpu_time_total for event in operations)
    executed = sum(event.count * operations_of(event.input_shapes[PRODUCTS[event.key] :]) for event in products)
    required, rate = required_operations(options, vocab, windows), gemm_rate(device, getattr(torch, options.dtype))
    print(
        f"V {vocab}  N {windows}: products take {fraction:.0%} of the time, at "
        f"{executed / micros * MICROSECONDS_PER_SECOND / GIGA / rate:.0%} of the GEMM rate; "
        f"{required / executed:.0%} of their operations are required"
    )


def operations_of(shapes: Sequence[Sequence[int]]) -> int:
    """Floating point operations of a product of `[..., m, k]` and `[..., k, n]`.

    >>> operations_of([[2, 3], [3, 4]])
    48
    """
    left, right = shapes[:2]
    return 2 * math.prod(left) * right[-1]


def build(options: argparse.Namespace, vocab: int, device: torch.device) -> DistillationModule:
    """Create the model of the options."""
    torch.manual_seed(0)
    module = make_module(LLAMA | MODELS[options.model] | {"vocab_size": vocab}, options).to(device)
    if options.compile:
        compile_layers(module.decoder_layers(""))
    return module


def make_module(network: dict[str, Any], options: argparse.Namespace) -> DistillationModule:
    """Gated LoRA on all linear layers of a model of this configuration, trained on the tokens of the rows."""
    config = PredictorConfig(
        BackboneSettings(from_config=network, dtype=options.dtype),
        objective=OneHotObjective(),
        window_length=options.window_length,
        lora=LoraSettings(rank=options.rank),
        sampling=SamplingConfig(),
    )
    return DistillationModule(config, loss=CrossEntropy(), source=DatasetWindows())


def random_batch(options: argparse.Namespace, vocab: int, windows: int) -> PackedBatch:
    """Rows of one document each, with windows at random positions."""
    shape = (options.rows, options.row_length)
    starts = torch.randint(1, options.row_length - options.window_length, (options.rows, windows))
    return PackedBatch(
        torch.randint(vocab, shape),
        torch.zeros(shape, dtype=torch.long),
        torch.arange(options.row_length).expand(shape).contiguous(),
        starts.sort(dim=1).values,
        torch.ones(shape, dtype=torch.bool),
    )


def required_operations(options: argparse.Namespace, vocab: int, windows: int) -> float:
    """Floating point operations of the matrix products that a step requires.

    These are: the context forward, without gradient; the teacher's head at tokens of windows; slots forward, and
    backward to activations and adapters; attention of slots to their context and window, without gradients of the
    context's keys and values; and the head forward and backward for all slots.
    """
    width, depth = MODELS[options.model]["hidden_size"], MODELS[options.model]["num_hidden_layers"]
    sizes = linear_sizes(options.model)
    weights, adapters = sum(a * b for a, b in sizes), options.rank * sum(a + b for a, b in sizes)
    starts = random_batch(options, vocab, windows).window_starts
    length = options.window_length
    tokens, slots = options.rows * options.row_length, options.rows * windows * (length - 1)
    in_windows = (starts.unsqueeze(-1) + torch.arange(length)).flatten(1)
    tokens_of_windows = sum(len(row.unique()) for row in in_windows)
    pairs_in_context = tokens * (options.row_length + 1) / 2
    pairs_with_context = int(starts.sum()) * (length - 1)
    pairs_in_windows = slots * length / 2
    layers = 2 * tokens * weights + slots * (4 * weights + 6 * adapters)
    attention = 4 * width * (pairs_in_context + 2 * pairs_with_context + 3 * pairs_in_windows)
    return depth * (layers + attention) + 2 * width * vocab * (tokens_of_windows + 2 * slots)


def linear_sizes(model: str) -> list[tuple[int, int]]:
    """(input, output) features of each linear layer of a decoder layer."""
    network = MODELS[model]
    width, inner, heads = network["hidden_size"], network["intermediate_size"], network["num_attention_heads"]
    key_width = width * network.get("num_key_value_heads", heads) // heads
    attention = [(width, width), (width, key_width), (width, key_width), (width, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def clock(device: torch.device) -> float:
    """Seconds: CPU time of this thread, or wall-clock time after the device has finished."""
    if device.type == "cpu":
        return thread_time()
    torch.cuda.synchronize(device)
    return perf_counter()


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a square matrix product in this process."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(10):
        begin = clock(device)
        torch.matmul(a, b)
        fastest = min(fastest, clock(device) - begin)
    return 2 * size**3 / fastest / GIGA


def device_name(device: torch.device) -> str:
    """Name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"


if __name__ == "__main__":
    main()
