"""What share of a product's rate a plain step reaches, the yardstick for that of `training_step`.

    python -m tests.benchmarks.plain_step [--model small small-512 small-1024] [--windows 16 64]     one thread of a CPU

Nothing of this package takes part: a frozen Llama of transformers reads whole rows, forward, and backward by its input
embeddings, as many rows as have the tokens and slots of a step of `training_step`. All that it computes is needed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from statistics import median
from time import thread_time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ptp_lightning.models import BackboneSettings
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.training.plan import LLAMA
from tests.benchmarks.training_step import MODELS, NUM_WARM_UP, gemm_rate

ROWS, ROW_LENGTH, WINDOW_LENGTH = 4, 256, 16
"""Of `training_step`: B, S and L."""


def main() -> None:
    """Measure and print a row for each model and number of windows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=["small"])
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for model, windows in itertools.product(options.model, options.windows):
        rows = math.ceil(ROWS * (ROW_LENGTH + windows * (WINDOW_LENGTH - 1)) / ROW_LENGTH)
        seconds, share = measure(model, options.vocab, rows, options.steps)
        print(f"{model:>10}  {rows:>3} rows  {seconds:8.3f} s a step  {share:4.0%} of the product's rate", flush=True)


def measure(model: str, vocab: int, rows: int, steps: int) -> tuple[float, float]:
    """CPU seconds of a step, and what its operations are of those that products could have made meanwhile: medians."""
    step = make_step(LLAMA | MODELS[model] | {"vocab_size": vocab}, rows)
    operations = operations_of_step(model, vocab, rows)
    seconds, shares = [], []
    for _ in range(NUM_WARM_UP + steps):
        rate = gemm_rate(torch.device("cpu"), torch.float32)
        begin = thread_time()
        step()
        seconds.append(thread_time() - begin)
        shares.append(operations / 1e9 / seconds[-1] / rate)
    return median(seconds[NUM_WARM_UP:]), median(shares[NUM_WARM_UP:])


def make_step(network: dict[str, Any], rows: int) -> Callable[[], None]:
    """Of a frozen model with this configuration."""
    torch.manual_seed(0)
    model = load_backbone(BackboneSettings(from_config=network)).requires_grad_(False)
    input_ids = torch.randint(model.config.vocab_size, (rows, ROW_LENGTH))

    def step() -> None:
        embeddings = model.get_input_embeddings()(input_ids).requires_grad_()
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()

    return step


def operations_of_step(model: str, vocab: int, rows: int) -> float:
    """Floating point operations of its products, as `training_step.needed_operations` counts them."""
    network = MODELS[model]
    width, inner, depth = network["hidden_size"], network["intermediate_size"], network["num_hidden_layers"]
    heads = network["num_attention_heads"]
    of_keys = width * network.get("num_key_value_heads", heads) // heads
    weights = 2 * width * width + 2 * width * of_keys + 3 * width * inner
    tokens = rows * ROW_LENGTH
    pairs = tokens * (ROW_LENGTH + 1) / 2
    return depth * (4 * tokens * weights + 3 * 4 * width * pairs) + 4 * width * vocab * tokens


if __name__ == "__main__":
    main()
