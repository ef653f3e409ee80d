"""Steps of training: windows by blocks against one dense mask, in results first, then in time and memory."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks import training_step
from benchmarks.on_a_gpu.rows import Figure, Record, attempt
from ptp_lightning.models.attention.blocks import Blocks
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.dense import Dense
from ptp_lightning.models.layers.compile import compile_layers
from ptp_lightning.training import DatasetWindows, DistillationModule
from ptp_lightning.utils.randomness import keyed_generator
from tests.helpers.tiny_distillation import LLAMA, make_module

LARGEST_DIFFERENCE = 1e-4  # of norms, in float32
GFLOPS_PER_TFLOP = 1000
DENSE, COMPILED = "dense", "compiled blocks"
WAYS = {"blocks": [], DENSE: ["--dense"], COMPILED: []}
"""And the options of `training_step` for a model that is there: to compile it is no such option."""
COMPARED = argparse.Namespace(rows=2, row_length=32, window_length=4)


def rows(
    record: Record, *, device: str, options: dict[str, Any], sizes: list[dict[str, int]], compiled: bool = False
) -> None:
    """Compare blocks and the dense mask, then measure both, and blocks in compiled layers.

    Args:
        record: takes the rows.
        device: where.
        options: of `training_step`, without the dashes, but for sizes.
        sizes: rows, row_length and windows of batches.
        compiled: whether compiled layers are measured, too.
    """
    if attempt(record, "blocks = dense", lambda: difference(torch.device(device))) is None:
        return  # what computes something else need not be timed
    parsed = parse("blocks", {**options, **sizes[0], "device": device})
    # One for all ways: to draw random weights takes longer than to measure.
    module = training_step.build(parsed, parsed.vocab[0], torch.device(device))
    found: dict[str, dict[str, dict[str, Figure] | None]] = {}
    for way in [way for way in WAYS if compiled or way != COMPILED]:
        if way == COMPILED:  # the last, because layers remain so
            compile_layers(module.decoder_layers(""))
        for batch in sizes:
            batch_name = "{rows} x {row_length} tokens, N {windows}".format(**batch)
            parsed = parse(way, {**options, **batch, "device": device})
            figures = attempt(record, f"{batch_name}: {way}", lambda parsed=parsed: step(parsed, module))
            found.setdefault(batch_name, {})[way] = figures
    for batch_name, of_ways in found.items():
        dense = of_ways.pop(DENSE)
        for way, figures in of_ways.items():
            if figures is not None and dense is not None:
                attempt(record, f"{batch_name}: {DENSE} / {way}", lambda f=figures, d=dense: _ratios(d, f))


def difference(device: torch.device) -> dict[str, Figure]:
    """How far hidden states and gradients of both ways are apart, in comparison with their norms.

    Raises:
        ValueError: it is more than rounding.
    """
    module = make_module(source=DatasetWindows()).to(device)
    predictor = module.predictor
    assert isinstance(predictor.attention.choose(device, torch.float32), Blocks), "which a Llama supports"
    batch = training_step.random_batch(COMPARED, LLAMA["vocab_size"], 5).to(device)
    with torch.no_grad():
        for parameter in predictor.parameters():  # where the low-rank term is zero, half of the gradients are
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=keyed_generator(1)).to(parameter)

    weights = torch.randn(LLAMA["hidden_size"], generator=keyed_generator(2)).to(device)

    def results() -> tuple[Tensor, Tensor]:
        module.zero_grad()
        context = predictor.encode(batch)
        sample = module.source.sample(predictor, context, keyed_generator(0))
        hidden = predictor.slot_hidden(context, sample.auxiliaries)
        (hidden * weights).sum().backward()  # not their norms, which are the same for all
        gradients = [one.grad.flatten() for one in predictor.parameters() if one.grad is not None]
        return hidden.detach(), torch.cat(gradients)

    by_blocks = results()
    predictor.attention = AttentionChoice(predictor.base_model, [Dense()])
    densely = results()
    states, gradients = (float((a - b).norm() / b.norm()) for a, b in zip(by_blocks, densely, strict=True))
    if not max(states, gradients) <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"expected hidden states and gradients to differ by at most {LARGEST_DIFFERENCE:g} of their norms, found "
            f"{states:.1e} and {gradients:.1e}"
        )
    return {"dtype": "float32", "difference_hidden": states, "difference_gradients": gradients}


def parse(way: str, arguments: dict[str, Any]) -> argparse.Namespace:
    """Options of `training_step` for a way of attending."""
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return training_step.parsed([*words, *WAYS[way]])


def step(options: argparse.Namespace, module: DistillationModule | None = None) -> dict[str, Figure]:
    """What `training_step` measures."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
    found = training_step.measure(options, options.vocab[0], options.windows[0], torch.device(options.device), module)
    return {
        "dtype": options.dtype,
        "seconds": found["seconds"],
        # On a CPU it is resident memory, of which what was measured before has left some free.
        "megabytes": found["megabytes"] if options.device == "cuda" else None,
        "gemm_tflops": found["gemm_gflops"] / GFLOPS_PER_TFLOP,
    }


def _ratios(dense: dict[str, Figure], other: dict[str, Figure]) -> dict[str, Figure]:
    found = {name: (dense[name], other[name]) for name in ("seconds", "megabytes")}
    return {f"times_{name}": float(a) / float(b) if a is not None and b else None for name, (a, b) in found.items()}
