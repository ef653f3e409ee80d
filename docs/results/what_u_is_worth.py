"""Draw docs/results/what_u_is_worth.png: what slots add, by what they know and by the correction behind them.

Run from anywhere: python docs/results/what_u_is_worth.py
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

TABLE = Path(__file__).with_suffix(".csv")
OUTPUT = Path(__file__).with_suffix(".png")
SLOTS = {
    "one_hot": ("u, one-hot", "#2f6fb3"),
    "categorical": ("u, categorical", "#22875a"),
    "no_u": ("no u", "#9aa5b1"),
}
CORRECTIONS = {
    "none": "no correction",
    "markov": "logit bias by\nthe token before",
    "token_conditioned": "head that knows\nthe token before",
}
WIDTH = 0.26


def main() -> None:
    """Draw a panel for each number of steps: bars are means over seeds, dots are seeds."""
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "complete"]
    budgets = sorted({int(row["steps"]) for row in rows})
    figure, panels = plt.subplots(1, len(budgets), figsize=(8 * len(budgets) ** 0.5, 4.2), sharey=True, squeeze=False)
    for ax, steps in zip(panels[0], budgets, strict=True):
        for offset, (slots, (label, colour)) in enumerate(SLOTS.items(), start=-1):
            for place, correction in enumerate(CORRECTIONS):
                key = (slots, correction, str(steps))
                found = [float(row["value"]) - 1 for row in rows if (row["slots"], row["correction"], row["steps"]) == key]
                if not found:
                    continue
                x = place + offset * WIDTH
                ax.bar(x, mean(found), WIDTH * 0.92, color=colour, label=label if place == 0 else None)
                ax.scatter([x] * len(found), found, s=12, color="#1f2933", zorder=3)
                ax.annotate(f"{mean(found):.2f}", (x, max(found)), xytext=(0, 4), textcoords="offset points", ha="center")
        ax.set_xticks(range(len(CORRECTIONS)), list(CORRECTIONS.values()))
        ax.set_title(f"{steps:,} steps", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("tokens that slots add")
    panels[0][0].legend(frameon=False, loc="upper left")
    figure.savefig(OUTPUT, dpi=120, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
