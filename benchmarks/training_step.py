"""What a training step costs: forward, backward and AdamW of a Llama with gated LoRA on all linear layers.

    python -m benchmarks.training_step [--vocab 2048 32000] [--windows 16 64]              one thread of a CPU
    python -m benchmarks.training_step --device cuda --dtype bfloat16 --model 1.1b

On a CPU times are CPU seconds of one thread and memory is the peak of resident memory above the start; on a GPU they
are seconds of the device and its own peak. The GEMM rate of the same process stands beside them, because machines
differ, and the share of it that the operations reach which a step cannot do without (`needed_operations`).
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
from ptp_lightning.planning.command import BACKBONES, LLAMA
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training import DatasetWindows, DistillationModule
from ptp_lightning.utils.randomness import keyed_generator


def four_layers(width: int) -> dict[str, Any]:
    """With heads of 64."""
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
"""Which of its arguments is the left factor."""


def parsed(args: list[str] | None = None) -> argparse.Namespace:
    """Options, by default of the command line."""
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
    parser.add_argument("--dense", action="store_true", help="attend through one mask of all windows of a row")
    parser.add_argument("--compile", action="store_true", help="see configs/strategy/compile.yaml")
    parser.add_argument("--profile", action="store_true", help="print what takes the time instead, by torch's profiler")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser.parse_args(args)


def main() -> None:
    """Measure and print a row for each vocabulary and number of windows."""
    options = parsed()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if options.profile:
        for vocab, windows in itertools.product(options.vocab, options.windows):
            profile(options, vocab, windows, device)
        return
    rate = gemm_rate(device, getattr(torch, options.dtype))
    print(f"{options.model} on {name_of(device)}, {options.dtype}; {rate:.0f} GFLOP/s in a square product")
    rows = []
    # Each in a process of its own: a heap that has grown once has room for what comes next.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as alone:
        for vocab, windows in itertools.product(options.vocab, options.windows):
            row = {"vocab": vocab, "windows": windows}
            row |= alone.submit(measure, options, vocab, windows, device).result()
            row["share"] = needed_operations(options, vocab, windows) / GIGA / row["products"]
            rows.append(row)
            print(
                "V {vocab:>6}  N {windows:>3}  {seconds:8.3f} s a step  {megabytes:8.0f} MB  "
                "{share:4.0%} of the product's rate, {gemm_gflops:.0f} GFLOP/s".format(**row),
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
    """What a step takes.

    The model is one that `build` has made for these options before, or made now.

    Returns:
        seconds: the median.
        megabytes: without those of the model that is there before.
        gemm_gflops: the product's rate, on a CPU the median of those before each step: machines slow down and recover.
        products: the median of a step's seconds times the rate before it, the 10^9 operations that products could have
            made.
    """
    module = build(options, vocab, device) if module is None else module
    attention = module.predictor.attention
    if options.dense:
        module.predictor.attention = AttentionChoice(module.predictor.base_model, [Dense()])
    step = make_step(module, options, vocab, windows, device)
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    before_all = gemm_rate(device, dtype)
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    with PeakMemory(device) as memory:
        # On a GPU the product's matrices would count as the step's memory.
        timing = timed(
            step, options.steps, device, lambda: gemm_rate(device, dtype) if device.type == "cpu" else before_all
        )
    module.predictor.attention = attention
    return timing | {"megabytes": (memory.peak_bytes - before) / MEGABYTE}


def timed(
    step: Callable[[int], None], num_steps: int, device: torch.device, gemm_rate_now: Callable[[], float]
) -> dict[str, float]:
    """What `measure` says of the time of steps, once it has warmed up."""
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
        "products": median(second * rate for second, rate in zip(seconds, rates, strict=True)),
    }


def make_step(
    module: DistillationModule, options: argparse.Namespace, vocab: int, windows: int, device: torch.device
) -> Callable[[int], None]:
    """A step of training, which gets its number."""
    trained = [parameter for parameter in module.predictor.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    torch.manual_seed(1)
    batch = random_batch(options, vocab, windows).to(device)

    def step(number: int) -> None:
        predictor = module.predictor
        context = predictor.encode(batch)
        sample = module.source.sample(predictor, context, keyed_generator(number))
        hidden = predictor.slot_hidden(context, sample.auxiliaries)
        loss = module._first_pass_loss(context, hidden, sample)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def profile(options: argparse.Namespace, vocab: int, windows: int, device: torch.device) -> None:
    """Print which operations of a step take the time of a CPU, and how fast and how needed matrix products are."""
    torch.set_num_threads(1)
    step = make_step(build(options, vocab, device), options, vocab, windows, device)
    for number in range(NUM_WARM_UP):
        step(number)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiled:
        step(NUM_WARM_UP)
    operations = profiled.key_averages()
    print(operations.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
    products = [one for one in profiled.key_averages(group_by_input_shape=True) if one.key in PRODUCTS]
    # A product that another one is made of does the work, and is listed, too.
    products = [one for one in products if one.self_cpu_time_total > one.cpu_time_total / 2]
    micros = sum(one.self_cpu_time_total for one in products)
    share = micros / sum(one.self_cpu_time_total for one in operations)
    made = sum(one.count * operations_of(one.input_shapes[PRODUCTS[one.key] :]) for one in products)
    needed, rate = needed_operations(options, vocab, windows), gemm_rate(device, getattr(torch, options.dtype))
    print(
        f"V {vocab}  N {windows}: products take {share:.0%} of the time at "
        f"{made / micros * MICROSECONDS_PER_SECOND / GIGA / rate:.0%} of the square product's rate; "
        f"{needed / made:.0%} of them are needed"
    )


def operations_of(shapes: Sequence[Sequence[int]]) -> int:
    """Of a product of `[..., m, k]` and `[..., k, n]`."""
    left, right = shapes[:2]
    return 2 * math.prod(left) * right[-1]


def build(options: argparse.Namespace, vocab: int, device: torch.device) -> DistillationModule:
    """The model of the options."""
    torch.manual_seed(0)
    module = make_module(LLAMA | MODELS[options.model] | {"vocab_size": vocab}, options).to(device)
    if options.compile:
        compile_layers(module.decoder_layers(""))
    return module


def make_module(network: dict[str, Any], options: argparse.Namespace) -> DistillationModule:
    """Gated LoRA on all linear layers of a model of this configuration, trained on the rows' own tokens."""
    config = PredictorConfig(
        BackboneSettings(from_config=network, dtype=options.dtype),
        objective=OneHotObjective(),
        window_length=options.window_length,
        lora=LoraSettings(rank=options.rank),
        sampling=SamplingConfig(),
    )
    return DistillationModule(config, loss=CrossEntropy(), source=DatasetWindows())


def random_batch(options: argparse.Namespace, vocab: int, windows: int) -> PackedBatch:
    """Rows of one document each, windows anywhere in them."""
    shape = (options.rows, options.row_length)
    starts = torch.randint(1, options.row_length - options.window_length, (options.rows, windows))
    return PackedBatch(
        torch.randint(vocab, shape),
        torch.zeros(shape, dtype=torch.long),
        torch.arange(options.row_length).expand(shape).contiguous(),
        starts.sort(dim=1).values,
        torch.ones(shape, dtype=torch.bool),
    )


def needed_operations(options: argparse.Namespace, vocab: int, windows: int) -> float:
    """Floating point operations of a step's matrix products, each where it is needed and once.

    The context forward without gradient; the teacher's head at tokens of windows; slots forward, and backward by
    activations and adapters alone; a slot's attention over its own context and window, whose gradients by the context's
    keys and values are not needed; the head forward and backward for every slot.
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
    of_stack = 2 * tokens * weights + slots * (4 * weights + 6 * adapters)
    of_attention = 4 * width * (pairs_in_context + 2 * pairs_with_context + 3 * pairs_in_windows)
    return depth * (of_stack + of_attention) + 2 * width * vocab * (tokens_of_windows + 2 * slots)


def linear_sizes(model: str) -> list[tuple[int, int]]:
    """Features in and out of each linear layer of a decoder layer."""
    network = MODELS[model]
    width, inner, heads = network["hidden_size"], network["intermediate_size"], network["num_attention_heads"]
    of_keys = width * network.get("num_key_value_heads", heads) // heads
    attention = [(width, width), (width, of_keys), (width, of_keys), (width, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def clock(device: torch.device) -> float:
    """Seconds: of this thread's CPU time, or of the wall clock once the device has done its work."""
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
        a @ b
        fastest = min(fastest, clock(device) - begin)
    return 2 * size**3 / fastest / GIGA


def name_of(device: torch.device) -> str:
    """What runs it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"


if __name__ == "__main__":
    main()
