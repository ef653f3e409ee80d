"""The report of an evaluation: `report.md` for people, `report.json` for programs, and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptp_lightning.evaluation.figures import draw
from ptp_lightning.evaluation.near_ties import Deviation
from ptp_lightning.evaluation.records import Record
from ptp_lightning.evaluation.summary import OVERALL, Gap, Interval, Score

BYTES_PER_MEGABYTE = 1_000_000
CONVENTIONS = """\
* **tokens per call**: all new tokens over all forward passes of the base model, those that read the prompt included.
* **correct**: tokens of a draft that are right, its exact first token counted, the base model's pick after them not.
* **committed**: what a draft yields: its correct tokens and that pick (the "+1").
* **speed**: tokens per second over those of the autoregressive decoder here (AR) and of `transformers.generate`, with
  95 % bootstrap intervals over questions. Above 1 is faster.
* **call cost**: time of a forward pass with all that belongs to it, in steps of the autoregressive decoder. Whoever
  gets more tokens from a call than that is faster: it is the break-even point.
* **identical**: answers that are, token for token, the autoregressive decoder's for the same seed. In float32 it has
  to be all; what differs is listed, and whether rounding at a near-tie explains it."""


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        run: what was asked for, and on which machine.
        scores: of all contenders.
        gaps: by temperature.
        deviations: answers that should have been identical.
        num_cut: prompts that had to be cut.
    """

    run: dict[str, Any]
    scores: list[Score]
    gaps: list[Gap]
    deviations: list[Deviation]
    num_cut: int

    def write(self, records: Iterable[Record], folder: Path) -> None:
        """Write the files, each at once: a reader never meets half of one."""
        pictures = draw(records, self.scores, self.gaps, self.run["slot_budgets"], folder)
        for name, text in (("report.json", self._as_json()), ("report.md", self.as_markdown(pictures))):
            part = folder / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(folder / name)

    def _as_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def as_markdown(self, pictures: Sequence[str]) -> str:
        """The report for people."""
        parts = ["# Evaluation", _bullets(self.run), CONVENTIONS]
        temperatures = sorted({score.temperature for score in self.scores})
        for temperature in temperatures:
            mine = [score for score in self.scores if score.temperature == temperature]
            overall = [score for score in mine if score.category == OVERALL]
            parts += [f"## Temperature {temperature:g}", _overall_table(overall), _phase_table(overall)]
            if len({score.category for score in mine}) > 2:
                parts += ["### By category", _category_table(mine)]
            parts += ["### Accuracy by position, while decoding, given a right prefix", _accuracy_table(overall)]
            parts += [_gap_section(gap) for gap in self.gaps if gap.temperature == temperature]
        parts += ["## Deviations", self._deviations()]
        if self.num_cut:
            parts.append(f"{self.num_cut} prompts were too long and lost their beginning.")
        parts += [f"![{name}]({name})" for name in pictures]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _deviations(self) -> str:
        if not self.deviations:
            return "None: every answer that has to be the autoregressive decoder's is."
        rows = [
            [
                entry.contender,
                entry.question_id,
                entry.turn,
                entry.seed,
                f"{entry.temperature:g}",
                entry.place,
                "a near-tie" if entry.near_tie else "**not explained**",
            ]
            for entry in self.deviations
        ]
        return _table(["contender", "question", "turn", "seed", "temperature", "first token", "reason"], rows)


def _bullets(run: dict[str, Any]) -> str:
    return "\n".join(f"* {name.replace('_', ' ')}: {value}" for name, value in run.items())


def _overall_table(scores: Sequence[Score]) -> str:
    head = ["", "tokens per call", "correct", "committed", "call cost", "speed (AR)", "speed (transformers)"]
    head += ["ms per token, median", "identical", "peak memory"]
    return _table(
        head,
        [
            [
                score.contender,
                f"{score.tokens_per_call:.2f}",
                _number(score.correct_per_cycle),
                _number(score.tokens_per_cycle),
                f"{score.call_cost:.2f}",
                _interval(score.speed),
                _interval(score.library_speed),
                f"{score.milliseconds_per_token:.2f}",
                "" if score.num_identical is None else f"{score.num_identical} of {score.num_answers}",
                f"{score.peak_bytes / BYTES_PER_MEGABYTE:.0f} MB",
            ]
            for score in scores
        ],
    )


def _phase_table(scores: Sequence[Score]) -> str:
    told = [score for score in scores if score.phases]
    phases = list(told[0].phases)
    return _table(
        ["share of time", *phases],
        [[score.contender, *(f"{score.phases[phase]:.0%}" for phase in phases)] for score in told],
    )


def _category_table(scores: Sequence[Score]) -> str:
    contenders = list(dict.fromkeys(score.contender for score in scores))
    by_place = {(score.category, score.contender): score for score in scores}
    rows = []
    for category in dict.fromkeys(score.category for score in scores):
        row = [by_place[category, name] for name in contenders]
        rows.append([category, *(f"{score.tokens_per_call:.2f}, {_interval(score.speed)}" for score in row)])
    return _table(["tokens per call, speed (AR)", *contenders], rows)


def _accuracy_table(scores: Sequence[Score]) -> str:
    told = [score for score in scores if score.accuracy_given_prefix]
    longest = max((len(score.accuracy_given_prefix) for score in told), default=0)
    if not longest:
        return ""
    head = ["position", *map(str, range(1, longest + 1))]
    rows = [[score.contender, *(f"{value:.3f}" for value in score.accuracy_given_prefix)] for score in told]
    return _table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])


def _gap_section(gap: Gap) -> str:
    head = ["all right up to token", *map(str, range(1, len(gap.everywhere) + 1)), "correct tokens"]
    curves = {
        "held-out windows (validation)": gap.validation,
        "every place of these texts": gap.everywhere,
        "where speculative decoding made a draft": gap.landed,
    }
    rows = [
        [name, *(f"{value:.3f}" for value in curve), f"{sum(curve):.2f}"]
        for name, curve in curves.items()
        if curve is not None
    ]
    by_context = _table(
        ["tokens before the draft", "every place", "where a draft was made"],
        [
            [
                f"{bin.first} and more" if bin.last is None else f"{bin.first} to {bin.last}",
                _number(bin.everywhere),
                _number(bin.landed),
            ]
            for bin in gap.by_context
        ],
    )
    return f"### From training to decoding\n\n{_table(head, rows)}\n\nMean correct tokens:\n\n{by_context}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
