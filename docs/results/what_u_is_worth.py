"""Draw docs/results/what_u_is_worth.png: what slots add with and without u, by the correction beside them.

Run from anywhere: python docs/results/what_u_is_worth.py
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

TABLE = Path(__file__).with_suffix(".csv")
OUTPUT = Path(__file__).with_suffix(".png")
STEPS = "260"
CORRECTIONS = {"none": "no correction", "markov": "Markov head", "token_conditioned": "token-conditioned head"}
SLOTS = {
    "no_u": ("slots without u (MTP)", "#b0b8c1"),
    "categorical": ("categorical slots, with u", "#2f6fb3"),
    "one_hot": ("one-hot slots, with u", "#22875a"),
}
INK = "#1f2933"
WIDTH = 0.26


def main() -> None:
    """Draw a group of bars for each correction, and a dot for each seed."""
    values: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["steps"] == STEPS:
                values[row["slots"], row["correction"]].append(float(row["value"]) - 1)
    figure, ax = plt.subplots(figsize=(8, 4.2))
    labelled: set[str] = set()
    for group, correction in enumerate(CORRECTIONS):
        for bar, (slots, (label, colour)) in enumerate(SLOTS.items()):
            x, seeds = group + (bar - 1) * WIDTH, values[slots, correction]
            if not seeds:
                continue
            ax.bar(x, mean(seeds), WIDTH * 0.92, color=colour, label=None if slots in labelled else label)
            labelled.add(slots)
            ax.scatter([x] * len(seeds), seeds, s=9, color=INK, zorder=3)
            ax.annotate(f"{mean(seeds):.2f}", (x, 0.02), ha="center", color="white", fontsize=9)
    ax.set_xticks(range(len(CORRECTIONS)), CORRECTIONS.values())
    ax.set(ylabel="tokens that slots add to a call")
    ax.legend(frameon=False, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUTPUT, dpi=120, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
