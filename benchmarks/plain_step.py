"""Fraction of the GEMM rate that a step of an unmodified model reaches, as a reference for `training_step`.

    python -m benchmarks.plain_step [--model small small-512 small-1024] [--windows 16 64]     one thread of a CPU

A frozen Llama of transformers runs forward, and backward to its input embeddings, on as many tokens as a step of
`training_step` has tokens and slots. There are no windows, adapters or optimizer, so all operations are required.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from benchmarks.training_step import GIGA, MODELS, gemm_rate, linear_sizes, parse_options, time_steps
from ptp_lightning.models import BackboneSettings
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.planning.backbones import LLAMA

CPU = torch.device("cpu")


def main() -> None:
    """Measure, and print a row for each model and number of windows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=["small"])
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    defaults = parse_options([])
    length = defaults.row_length
    for model, windows in itertools.product(options.model, options.windows):
        rows = math.ceil(defaults.rows * (length + windows * (defaults.window_length - 1)) / length)
        step = make_step(model, options.vocab, rows, length)
        timing = time_steps(step, options.steps, CPU, lambda: gemm_rate(CPU, torch.float32))
        operations = sum(operations_of_step(model, options.vocab, rows, length))
        fraction = operations / GIGA / timing["possible_gigaflop"]
        print(
            f"{model:>10}  {rows:>3} rows  {timing['seconds']:8.3f} s per step  {fraction:4.0%} of the GEMM rate, "
            f"{timing['gemm_gflops']:.0f} GFLOP/s",
            flush=True,
        )


def make_step(model: str, vocab: int, rows: int, length: int) -> Callable[[int], None]:
    """A forward and backward pass through a frozen model of `training_step`."""
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
    """Floating point operations of a step: of its linear layers, and of causal attention.

    Counted as in `training_step.required_operations`: forward, and backward to activations only.
    """
    width, depth = MODELS[model]["hidden_size"], MODELS[model]["num_hidden_layers"]
    weights = depth * sum(a * b for a, b in linear_sizes(model)) + width * vocab
    tokens = rows * length
    return 4 * tokens * weights, 3 * 4 * depth * width * tokens * (length + 1) / 2


if __name__ == "__main__":
    main()
