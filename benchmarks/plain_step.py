"""What share of a product's rate a plain step reaches, the yardstick for that of `training_step`.

    python -m benchmarks.plain_step [--model small small-512 small-1024] [--windows 16 64]     one thread of a CPU

A frozen Llama, as transformers makes it, reads whole rows, forward, and backward by its input embeddings, as many rows
as have the tokens and slots of a step of `training_step`. No window, adapter or optimiser: all that it computes is
needed.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from benchmarks.training_step import GIGA, MODELS, gemm_rate, linear_sizes, parsed, timed
from ptp_lightning.models import BackboneSettings
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.planning.command import LLAMA

CPU = torch.device("cpu")


def main() -> None:
    """Measure and print a row for each model and number of windows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=["small"])
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    of_windows = parsed([])
    length = of_windows.row_length
    for model, windows in itertools.product(options.model, options.windows):
        rows = math.ceil(of_windows.rows * (length + windows * (of_windows.window_length - 1)) / length)
        step = make_step(model, options.vocab, rows, length)
        timing = timed(step, options.steps, CPU, lambda: gemm_rate(CPU, torch.float32))
        operations = sum(operations_of_step(model, options.vocab, rows, length))
        share = operations / GIGA / timing["products"]
        print(
            f"{model:>10}  {rows:>3} rows  {timing['seconds']:8.3f} s a step  {share:4.0%} of the product's rate, "
            f"{timing['gemm_gflops']:.0f} GFLOP/s",
            flush=True,
        )


def make_step(model: str, vocab: int, rows: int, length: int) -> Callable[[int], None]:
    """Forward and backward through a frozen model of `training_step`."""
    torch.manual_seed(0)
    backbone = load_backbone(BackboneSettings(from_config=LLAMA | MODELS[model] | {"vocab_size": vocab}))
    backbone.requires_grad_(False)
    input_ids = torch.randint(vocab, (rows, length))

    def step(_: int) -> None:
        embeddings = backbone.get_input_embeddings()(input_ids).requires_grad_()
        logits = backbone(inputs_embeds=embeddings, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()

    return step


def operations_of_step(model: str, vocab: int, rows: int, length: int) -> tuple[float, float]:
    """Floating point operations of a step's linear layers and of attention, where a token sees those up to itself.

    Counted as by `training_step.needed_operations`: forward, and backward by activations alone.
    """
    width, depth = MODELS[model]["hidden_size"], MODELS[model]["num_hidden_layers"]
    weights = depth * sum(a * b for a, b in linear_sizes(model)) + width * vocab
    tokens = rows * length
    return 4 * tokens * weights, 3 * 4 * depth * width * tokens * (length + 1) / 2


if __name__ == "__main__":
    main()
