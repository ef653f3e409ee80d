"""Draw docs/results/smollm2_training.png: correct tokens of the SmolLM2 adapter over its training.

Run from anywhere: python docs/results/smollm2_training.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib.pyplot as plt

TABLE = Path(__file__).with_suffix(".csv")
OUTPUT = Path(__file__).with_suffix(".png")
CURVES = {
    "gsm8k_mbpp_at_0.7": ("GSM8K and MBPP, temperature 0.7", "#2f6fb3"),
    "chats_greedy": ("chats, greedy", "#22875a"),
    "chats_at_0.7": ("chats, temperature 0.7", "#d9822b"),
}
INK = "#1f2933"


def main() -> None:
    """Draw one line for each kind of unseen text."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    hours = [float(row["cpu_hours"]) for row in rows]
    figure, ax = plt.subplots(figsize=(8, 4.2))
    for column, (label, colour) in CURVES.items():
        values = [float(row[column]) for row in rows]
        ax.plot(hours, values, color=colour, lw=2)
        ax.annotate(f" {label}", (hours[-1], values[-1]), color=colour, va="center", fontsize=10)
    ax.axhline(1, color=INK, lw=1, ls=":")
    ax.annotate("the exact first token alone", (hours[-1], 1), ha="right", va="bottom", color=INK, fontsize=9)
    ax.set(xlabel="CPU hours", ylabel="correct tokens of 8", ylim=(0.9, None), xlim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUTPUT, dpi=120, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
