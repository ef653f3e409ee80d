"""Perplexity by position of slots trained without a teacher, compared with a separate autoregressive model.

    python -m benchmarks.teacher_free_gap --data PICKUPS.csv.gz --teacher runs/nyc_teacher/model CHECKPOINT ...

Uses all held-out rows (validation and test) with 16 windows per row; auxiliary variables are inferred `--draws` times.
For each checkpoint, in per cent: the perplexity of slots above the network's own autoregressive perplexity, that of
slots above the separate model, and the network's own autoregressive perplexity above the separate model. Standard
errors are those of positions 2 and 16, over windows.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptp_lightning.auxiliary_strategies import UniformInInterval
from ptp_lightning.data import PackedBatch, PickUps, SeriesDataModule
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.training.modules.inversion import append_unused_auxiliary, invert
from ptp_lightning.training.windows.dataset_windows import hidden_before_tokens, window_tokens

LENGTH = 16
PRINTED_POSITIONS = (1, 2, 3, 4, 8, 16)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).eval()
    data = SeriesDataModule(
        PickUps(options.data), row_length=33, batch_size=64, num_windows=LENGTH, max_context=16, eval_rows=10**6
    )
    batches = [batch for split in ("val", "test") for batch in data.fixed_batches(split)]
    for path in options.checkpoints:
        predictor = load_network(path)
        generator = torch.Generator().manual_seed(0)
        nats = [nats_of(batch, predictor, teacher, options.draws, generator) for batch in batches]
        slots, own, separate = (torch.cat(parts) for parts in zip(*nats, strict=True))
        print(f"{path}: {len(slots)} windows")
        for name, difference in {
            "slots / own autoregressive": slots - own,
            "slots / separate model": slots - separate,
            "own autoregressive / separate model": own - separate,
        }.items():
            values = "  ".join(f"{percent(difference[:, k - 1].mean()):5.2f}" for k in PRINTED_POSITIONS)
            errors = [percent(difference[:, k - 1].std() / len(difference) ** 0.5) for k in (2, LENGTH)]
            mean = percent(difference[:, 1:].mean())
            print(
                f"  {name:<36}{values}   mean of 2 to 16 {mean:.2f}   standard errors {errors[0]:.2f}, {errors[1]:.2f}"
            )


def percent(nats: Tensor) -> float:
    """Increase of the perplexity in per cent, for a difference in nats."""
    return 100 * math.expm1(float(nats))


@torch.no_grad()
def nats_of(
    batch: PackedBatch,
    predictor: PredictorNetwork,
    teacher: PreTrainedModel,
    num_draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Nats `[windows, L]` of tokens: by slots, by the network autoregressively, and by the separate model."""
    context = predictor.encode(batch)
    token_ids, mask = window_tokens(batch, LENGTH)
    whole = mask.all(-1)

    def of(logits: Tensor) -> Tensor:
        flat = F.cross_entropy(logits.float().flatten(0, -2), token_ids.flatten(), reduction="none")
        return flat.view_as(token_ids)[whole]

    by_slots = torch.zeros(int(whole.sum()), LENGTH)
    for _ in range(num_draws):
        auxiliaries = invert(predictor, context, token_ids, UniformInInterval(), generator)
        hidden = predictor.slot_hidden(context, append_unused_auxiliary(auxiliaries.values))
        hidden = torch.cat([context.first_hidden.unsqueeze(2), hidden], dim=2)
        by_slots += of(predictor.slot_logits(hidden)) / num_draws
    own = of(predictor.logits(hidden_before_tokens(context, LENGTH)))
    positions = batch.window_starts.unsqueeze(-1) + torch.arange(LENGTH) - 1
    logits = teacher(batch.input_ids).logits
    separate = of(torch.stack([row[at] for row, at in zip(logits, positions, strict=True)]))
    return by_slots, own, separate


if __name__ == "__main__":
    main()
