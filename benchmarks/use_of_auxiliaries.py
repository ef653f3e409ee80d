"""Does a trained student read the auxiliaries of its slots?

    python -m benchmarks.use_of_auxiliaries [--adapter smollm2 --dtype bfloat16] [--limit 10]
    python -m benchmarks.use_of_auxiliaries --adapter smollm2 --benchmark spec_bench --questions question.jsonl

Texts are sampled by the base model. At each of their positions the student drafts a window three times: its slots get
the u of the text; the u of another text; or 1/2. Tokens are always picked with the u of the text. What is lost without
it is what the student makes of u. A draft of independent slots loses nothing.

A slot of categorical PTP carries the u of a token before the one that it predicts, so the loss is the use of dependence
between tokens. A slot of one-hot PTP also carries the u of its own token, which it needs to pick one at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ptp_lightning.decoding import GenerationSettings, decode_autoregressively
from ptp_lightning.decoding.text import tokenizer_of
from ptp_lightning.evaluation.acceptance_gap import correct_tokens_at_all_positions
from ptp_lightning.evaluation.conversation import make_prompt
from ptp_lightning.evaluation.questions import BENCHMARKS, HELD_OUT_CODE, read_questions
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.option_names import DTYPES
from ptp_lightning.sweeps.summary import half_width

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ptp_lightning.models.network import PredictorNetwork

SEED_OF_OTHERS = 2**20  # added to the seed of a text
Replacement = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="folder or name of a predictor; by default the shipped one for code")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base model; by default the adapter's")
    parser.add_argument("--benchmark", choices=list(BENCHMARKS), default=HELD_OUT_CODE)
    parser.add_argument("--questions", help="file of the benchmark")
    parser.add_argument("--limit", type=int, default=10, help="number of texts")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_prompt_tokens", type=int, default=512)
    options = parser.parse_args()
    predictor = load_network(options.adapter, dtype=options.dtype).eval()
    tokenizer = tokenizer_of(predictor)
    questions = read_questions(options.benchmark, options.questions, options.limit)
    prompts = [make_prompt(tokenizer, [], one.turns[0], options.max_prompt_tokens).token_ids for one in questions]
    settings = GenerationSettings(
        predictor.config.sampling, options.max_new_tokens, window_length=predictor.config.window_length
    )
    found: dict[str, list[list[int]]] = {}
    for seed, prompt in enumerate(prompts):
        for name, numbers in correct_tokens(predictor, prompt, replace(settings, seed=seed)).items():
            found.setdefault(name, []).append(numbers)
    print(report(found, settings.window_length))


def correct_tokens(
    predictor: PredictorNetwork, prompt: Sequence[int], settings: GenerationSettings
) -> dict[str, list[int]]:
    """Correct tokens of the drafts at each position of a text, by what the slots get."""
    text = decode_autoregressively(predictor, [prompt], settings)[0].token_ids
    assert isinstance(settings.seed, int)
    generator = torch.Generator().manual_seed(SEED_OF_OTHERS + settings.seed)
    replacements: dict[str, Replacement] = {
        "u of the text": lambda u: u,
        "u of another text": lambda u: torch.rand(u.shape, dtype=u.dtype, generator=generator).to(u.device),
        "1/2": lambda u: torch.full_like(u, 0.5),
    }
    found = {}
    for name, replacement in replacements.items():
        with _slots_get(predictor, replacement):
            found[name] = correct_tokens_at_all_positions(predictor, prompt, text, settings)
    return found


@contextmanager
def _slots_get(predictor: PredictorNetwork, replacement: Replacement) -> Iterator[None]:
    def exchange(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (replacement(args[0]),)

    handle = predictor.slot_encoder.register_forward_pre_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


def report(found: dict[str, list[list[int]]], window_length: int) -> str:
    """A table: mean correct tokens, the loss to the first row, and the accuracy of positions after correct tokens.

    Args:
        found: correct tokens, a list for each text, by what the slots get.
        window_length: L.

    >>> print(report({"own": [[2, 1], [3, 2]], "other": [[1, 1], [2, 2]]}, window_length=3))
    2 texts, 4 drafts of 3 tokens; half of a 95 % interval over texts
                       correct tokens  loss             accuracy after correct tokens, from the second token
    own                        2.000                    0.75 0.33
    other                      1.500   0.500 ± 0.000    0.50 0.00
    """
    names = list(found)
    own = [fmean(numbers) for numbers in found[names[0]]]
    num_drafts = sum(map(len, found[names[0]]))
    lines = [
        f"{len(own)} texts, {num_drafts:,} drafts of {window_length} tokens; half of a 95 % interval over texts",
        f"{'':18}{'correct tokens':>15}  {'loss':17}accuracy after correct tokens, from the second token",
    ]
    for name in names:
        means = [fmean(numbers) for numbers in found[name]]
        losses = [before - after for before, after in zip(own, means, strict=True)]
        loss = "" if name == names[0] else f"{fmean(losses):.3f} ± {half_width(losses):.3f}"
        pooled = [number for numbers in found[name] for number in numbers]
        survivors = [sum(number >= k for number in pooled) for k in range(1, window_length + 1)]
        accuracy = [later / max(earlier, 1) for earlier, later in pairwise(survivors)]
        lines.append(f"{name:18}{fmean(means):14.3f}   {loss:17}" + " ".join(f"{one:.2f}" for one in accuracy))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
