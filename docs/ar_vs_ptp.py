"""Draw docs/ar_vs_ptp.png: where the randomness enters in autoregressive and in parallel token prediction.

Run from anywhere: python docs/ar_vs_ptp.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

OUTPUT = Path(__file__).with_suffix(".png")
WIDTH, HEIGHT = 13.85, 7.2  # inches; one data unit is one inch

INK = "#1f2933"
MUTED = "#52606d"


class Colours(NamedTuple):
    """Fill and edge of one kind of box."""

    fill: str
    edge: str


CONTEXT = Colours("#eef1f4", "#7b8794")
BASE = Colours("#dbe9f9", "#2f6fb3")
STUDENT = Colours("#e6dff7", "#6b4fbb")
NOISE = Colours("#ffe3c2", "#d9822b")
DRAFTED = Colours("#ffffff", "#6b4fbb")
COMMITTED = Colours("#d9f2e3", "#22875a")
REJECTED = Colours("#fbdcdc", "#c23b3b")
DISCARDED = Colours("#f5f7fa", "#b0b8c1")

CONTEXT_TOKEN = "return"
TEXT = ["self", ".", "items", "["]
DRAFT = ["self", ".", "items", "(", ")"]


def box(ax: Axes, x: float, y: float, text: str, colours: Colours, width: float = 0.86, height: float = 0.46) -> None:
    """Draw a rounded box; tokens are set in a monospaced face."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.09"
    ax.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=colours.fill, edgecolor=colours.edge, lw=1.7))
    ax.text(x, y - 0.02, text, ha="center", va="center", fontsize=15, color=INK, family="DejaVu Sans Mono")


def wide_box(
    ax: Axes, left: float, right: float, y: float, name: str, role: str, colours: Colours, height: float = 0.62
) -> None:
    """Draw a step that spans a window: its name in bold, its role at the right."""
    box(ax, (left + right) / 2, y, "", colours, width=right - left, height=height)
    ax.text(left + 0.2, y - 0.01, name, ha="left", va="center", fontsize=15, weight="bold", color=INK)
    ax.text(right - 0.2, y - 0.01, role, ha="right", va="center", fontsize=14, color=INK)


def noise(ax: Axes, x: float, y: float, index: int, radius: float = 0.23) -> None:
    """Draw the auxiliary u_index as a disc."""
    ax.add_patch(Circle((x, y), radius, facecolor=NOISE.fill, edgecolor=NOISE.edge, lw=1.7))
    ax.text(x, y - 0.01, f"$u_{index}$", ha="center", va="center", fontsize=16, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = MUTED) -> None:
    """Draw a straight arrow."""
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, lw=1.6, color=colour, shrinkA=0, shrinkB=0)
    )


def bracket(ax: Axes, left: float, right: float, text: str, colour: str) -> None:
    """Draw a bar with a verdict above some of the verified tokens."""
    ax.plot([left, right], [5.53, 5.53], color=colour, lw=2.2, solid_capstyle="butt")
    ax.text((left + right) / 2, 5.63, text, ha="center", fontsize=13.5, color=colour)


def heading(ax: Axes, x: float, title: str, subtitle: str, conclusion: str) -> None:
    """Write what stands above and below a panel."""
    ax.text(x, 6.7, title, fontsize=20, weight="bold", color=INK)
    ax.text(x, 6.28, subtitle, fontsize=15, color=MUTED)
    ax.text(x, 0.22, conclusion, fontsize=16, weight="bold", color=COMMITTED.edge)


def draw_autoregressive(ax: Axes) -> None:
    """Left panel: one call per token, u picks behind the model, every token waits for the one before."""
    heading(
        ax,
        0.3,
        "Autoregressive sampling",
        "$u$ enters after the model: one call per token",
        "4 tokens: 4 calls, one after another",
    )
    pitch, first, half = 1.57, 1.22, 0.43
    for k, token in enumerate(TEXT):
        x = first + k * pitch
        box(ax, x, 1.05, TEXT[k - 1] if k else CONTEXT_TOKEN, COMMITTED if k else CONTEXT)
        box(ax, x, 2.35, "", BASE, height=0.62)
        ax.text(x, 2.34, f"call {k + 1}", ha="center", va="center", fontsize=15, weight="bold", color=INK)
        box(ax, x, 3.75, "pick", NOISE, width=0.66, height=0.42)
        noise(ax, x - 0.72, 3.75, k + 1)
        arrow(ax, (x - 0.49, 3.75), (x - 0.33, 3.75), NOISE.edge)
        box(ax, x, 5.17, token, COMMITTED)
        arrow(ax, (x, 1.28), (x, 2.04))
        arrow(ax, (x, 2.66), (x, 3.54))
        arrow(ax, (x, 3.96), (x, 4.94))
        if k + 1 < len(TEXT):
            lane = x + half + 0.12
            ax.plot([x + half, lane, lane], [5.17, 5.17, 1.05], color=COMMITTED.edge, lw=1.6)
            arrow(ax, (lane, 1.05), (x + pitch - half, 1.05), COMMITTED.edge)


def draw_parallel(ax: Axes) -> None:
    """Right panel: u is input, one call drafts a window, a second one verifies it with the same u."""
    left, columns = 7.15, [8.78 + 1.1 * k for k in range(len(DRAFT))]
    right = columns[-1] + 0.46
    heading(
        ax,
        left,
        "Parallel Token Prediction",
        "$u$ enters as input: one call predicts several tokens jointly",
        "4 tokens: 2 calls, and exactly the same text",
    )
    for y in (1.05, 2.73):
        box(ax, left + 0.46, y, CONTEXT_TOKEN, CONTEXT)
        arrow(ax, (left + 0.46, y + 0.23), (left + 0.46, y + 0.51))
    wide_box(ax, left, right, 1.87, "call 1: draft", "base model + LoRA on the $u$ slots", STUDENT)
    wide_box(ax, left, right, 3.55, "call 2: verify", "base model alone", BASE)
    wide_box(ax, columns[0] - 0.46, right, 4.4, "pick", "with the same $u_1$ … $u_5$", NOISE, height=0.42)
    wrong = len(TEXT) - 1
    for k, (x, drafted) in enumerate(zip(columns, DRAFT, strict=True)):
        noise(ax, x, 1.05, k + 1)
        arrow(ax, (x, 1.28), (x, 1.56), NOISE.edge)
        arrow(ax, (x, 2.18), (x, 2.5))
        box(ax, x, 2.73, drafted, REJECTED if k == wrong else DRAFTED)
        arrow(ax, (x, 2.96), (x, 3.24))
        arrow(ax, (x, 3.86), (x, 4.19))
        if k > wrong:  # verified after a wrong token: its distribution is of no use
            box(ax, x, 5.17, "", DISCARDED)
            continue
        arrow(ax, (x, 4.61), (x, 4.94))
        box(ax, x, 5.17, TEXT[k], COMMITTED)
    bracket(ax, columns[0] - 0.43, columns[wrong - 1] + 0.43, "equal: accepted", COMMITTED.edge)
    bracket(ax, columns[wrong] - 0.43, columns[wrong] + 0.43, "corrected", REJECTED.edge)
    bracket(ax, columns[wrong + 1] - 0.43, columns[-1] + 0.43, "discarded", MUTED)


def main() -> None:
    """Draw the figure and write it beside this file."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    ax.plot([6.78, 6.78], [0.2, 6.95], color="#cbd2d9", lw=1.2)
    draw_autoregressive(ax)
    draw_parallel(ax)
    figure.savefig(OUTPUT, dpi=150)


if __name__ == "__main__":
    main()
