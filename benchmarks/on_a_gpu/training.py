"""Training steps with block attention and with dense attention: equal results, then time and memory."""

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

TOLERANCE = 1e-4  # relative difference of norms, in float32
GFLOPS_PER_TFLOP = 1000
DENSE, COMPILED = "dense", "compiled blocks"
VARIANTS = {"blocks": [], DENSE: ["--dense"], COMPILED: []}
"""Options of `training_step` by variant; layers are compiled here."""
COMPARED = argparse.Namespace(rows=2, row_length=32, window_length=4)


def rows(
    record: Record, *, device: str, options: dict[str, Any], sizes: list[dict[str, int]], compiled: bool = False
) -> None:
    """Compare the results of block and dense attention, then measure both, and blocks in compiled layers.

    Args:
        record: receives the rows.
        device: of the model.
        options: of `training_step`, without dashes and sizes.
        sizes: rows, row_length and windows of batches.
        compiled: also measure compiled layers.
    """
    if attempt(record, "blocks = dense", lambda: difference(torch.device(device))) is None:
        return  # wrong results are not timed
    parsed = parse("blocks", {**options, **sizes[0], "device": device})
    # One model for all variants, because drawing random weights takes longer than measuring.
    module = training_step.build(parsed, parsed.vocab[0], torch.device(device))
    found: dict[str, dict[str, dict[str, Figure] | None]] = {}
    for variant in [variant for variant in VARIANTS if compiled or variant != COMPILED]:
        if variant == COMPILED:  # last, because it cannot be undone
            compile_layers(module.decoder_layers(""))
        for batch in sizes:
            batch_name = "{rows} x {row_length} tokens, N {windows}".format(**batch)
            parsed = parse(variant, {**options, **batch, "device": device})
            figures = attempt(record, f"{batch_name}: {variant}", lambda parsed=parsed: step(parsed, module))
            found.setdefault(batch_name, {})[variant] = figures
    for batch_name, by_variant in found.items():
        dense = by_variant.pop(DENSE)
        for variant, figures in by_variant.items():
            if figures is not None and dense is not None:
                attempt(record, f"{batch_name}: {DENSE} / {variant}", lambda f=figures, d=dense: _ratios(d, f))


def difference(device: torch.device) -> dict[str, Figure]:
    """Relative differences of hidden states and gradients between block and dense attention.

    Raises:
        ValueError: they are larger than rounding.
    """
    module = make_module(source=DatasetWindows()).to(device)
    predictor = module.predictor
    assert isinstance(predictor.attention.choose(device, torch.float32), Blocks), "which a Llama supports"
    batch = training_step.random_batch(COMPARED, LLAMA["vocab_size"], 5).to(device)
    with torch.no_grad():
        for parameter in predictor.parameters():  # otherwise the low-rank term and half of the gradients are zero
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=keyed_generator(1)).to(parameter)

    weights = torch.randn(LLAMA["hidden_size"], generator=keyed_generator(2)).to(device)

    def results() -> tuple[Tensor, Tensor]:
        module.zero_grad()
        context = predictor.encode(batch)
        sample = module.source.sample(predictor, context, keyed_generator(0))
        hidden = predictor.slot_hidden(context, sample.auxiliaries, sample.token_ids[..., 0])
        (hidden * weights).sum().backward()  # not a sum of norms, which normalisation makes constant
        gradients = [each.grad.flatten() for each in predictor.parameters() if each.grad is not None]
        return hidden.detach(), torch.cat(gradients)

    by_blocks = results()
    predictor.attention = AttentionChoice(predictor.base_model, [Dense()])
    densely = results()
    states, gradients = (float((a - b).norm() / b.norm()) for a, b in zip(by_blocks, densely, strict=True))
    if not max(states, gradients) <= TOLERANCE:
        raise ValueError(
            f"expected hidden states and gradients to differ by at most {TOLERANCE:g} of their norms, found "
            f"{states:.1e} and {gradients:.1e}"
        )
    return {"dtype": "float32", "difference_hidden": states, "difference_gradients": gradients}


def parse(variant: str, arguments: dict[str, Any]) -> argparse.Namespace:
    """Options of `training_step` for a variant."""
    given = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return training_step.parse_options([*given, *VARIANTS[variant]])


def step(options: argparse.Namespace, module: DistillationModule | None = None) -> dict[str, Figure]:
    """The figures of `training_step`."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
    found = training_step.measure(options, options.vocab[0], options.windows[0], torch.device(options.device), module)
    return {
        "dtype": options.dtype,
        "seconds": found["seconds"],
        # Resident memory on a CPU is not comparable, because earlier measurements have left free memory.
        "megabytes": found["megabytes"] if options.device == "cuda" else None,
        "gemm_tflops": found["gemm_gflops"] / GFLOPS_PER_TFLOP,
    }


def _ratios(dense: dict[str, Figure], other: dict[str, Figure]) -> dict[str, Figure]:
    found = {name: (dense[name], other[name]) for name in ("seconds", "megabytes")}
    return {f"times_{name}": float(a) / float(b) if a is not None and b else None for name, (a, b) in found.items()}
