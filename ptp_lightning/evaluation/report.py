"""The report of an evaluation: `report.md` for readers, `report.json` for programs, and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptp_lightning.evaluation.acceptance_gap import AcceptanceGap
from ptp_lightning.evaluation.figures import save_figures
from ptp_lightning.evaluation.near_ties import Deviation
from ptp_lightning.evaluation.records import Record
from ptp_lightning.evaluation.summary import OVERALL, ConfidenceInterval, Score
from ptp_lightning.utils.atomic_files import write_atomically

BYTES_PER_MEGABYTE = 1_000_000
CONVENTIONS = """\
* **tokens per call**: new tokens per forward pass of the base model, including the passes that read the prompt.
* **correct**: correct tokens of a draft, including the exact first token. Of a tree of drafts (`num draft tokens`
  above 0) the longest correct path counts; validation and "all positions" are measured with single drafts.
* **committed**: tokens committed per draft: the correct tokens, and the token that the base model picks after them
  (the "+1"). With late slots the first correct token was committed by the cycle before, and so it was for drafts of
  `lookup` and `speculative_lookup` that need no network.
* **speed**: tokens per second, relative to the autoregressive decoder of this package (AR) and to
  `transformers.generate`, with 95 % bootstrap intervals over questions. Above 1 is faster.
* **call cost**: time per forward pass, including everything else, in steps of the autoregressive decoder. A decoder is
  faster if its tokens per call exceed this number (the break-even point).
* **identical**: answers whose tokens are identical to the autoregressive decoder's for the same seed. In float32 all
  must be. Differences are listed, with whether rounding at a near-tie explains them."""


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        run: settings of the evaluation, and the machine.
        scores: of all decoders.
        gaps: by temperature.
        deviations: answers that should have been identical.
        num_truncated: number of truncated prompts.
    """

    run: dict[str, Any]
    scores: list[Score]
    gaps: list[AcceptanceGap]
    deviations: list[Deviation]
    num_truncated: int

    def write(self, records: Iterable[Record], folder: Path) -> None:
        """Write the files atomically."""
        figures = save_figures(records, self.scores, self.gaps, self.run["slot_budgets"], folder)
        for name, text in (("report.json", self._as_json()), ("report.md", self.as_markdown(figures))):
            write_atomically(folder / name, text.encode())

    def _as_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def as_markdown(self, figures: Sequence[str]) -> str:
        """The report as Markdown, with links to these figures."""
        parts = ["# Evaluation", _bullets(self.run), CONVENTIONS]
        temperatures = sorted({score.temperature for score in self.scores})
        for temperature in temperatures:
            at_temperature = [score for score in self.scores if score.temperature == temperature]
            overall = [score for score in at_temperature if score.category == OVERALL]
            parts += [f"## Temperature {temperature:g}", _overall_table(overall), _phase_table(overall)]
            if len({score.category for score in at_temperature}) > 2:
                parts += ["### By category", _category_table(at_temperature)]
            parts += ["### Accuracy by position of the draft, given a correct prefix", _accuracy_table(overall)]
            parts += [_gap_section(gap) for gap in self.gaps if gap.temperature == temperature]
        parts += ["## Deviations", self._deviations()]
        if self.num_truncated:
            parts.append(f"{self.num_truncated} prompts were too long and were truncated at the start.")
        parts += [f"![{name}]({name})" for name in figures]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _deviations(self) -> str:
        if not self.deviations:
            return "None: all answers of exact decoders are identical to the autoregressive decoder's."
        rows = [
            [
                entry.decoder,
                entry.question_id,
                entry.turn,
                entry.seed,
                f"{entry.temperature:g}",
                entry.position,
                "a near-tie" if entry.near_tie else "**not explained**",
            ]
            for entry in self.deviations
        ]
        return _table(["decoder", "question", "turn", "seed", "temperature", "first token", "reason"], rows)


def _bullets(run: dict[str, Any]) -> str:
    return "\n".join(f"* {name.replace('_', ' ')}: {value}" for name, value in run.items())


def _overall_table(scores: Sequence[Score]) -> str:
    head = ["", "tokens per call", "correct", "committed", "call cost", "speed (AR)", "speed (transformers)"]
    head += ["ms per token, median", "identical", "peak memory"]
    return _table(
        head,
        [
            [
                score.decoder,
                f"{score.tokens_per_call:.2f}",
                _number(score.correct_per_cycle),
                _number(score.tokens_per_cycle),
                f"{score.call_cost:.2f}",
                _interval(score.speed),
                _interval(score.transformers_speed),
                f"{score.milliseconds_per_token:.2f}",
                "" if score.num_identical is None else f"{score.num_identical} of {score.num_answers}",
                f"{score.peak_bytes / BYTES_PER_MEGABYTE:.0f} MB",
            ]
            for score in scores
        ],
    )


def _phase_table(scores: Sequence[Score]) -> str:
    timed = [score for score in scores if score.phases]
    phases = list(timed[0].phases)
    return _table(
        ["fraction of time", *phases],
        [[score.decoder, *(f"{score.phases[phase]:.0%}" for phase in phases)] for score in timed],
    )


def _category_table(scores: Sequence[Score]) -> str:
    decoders = list(dict.fromkeys(score.decoder for score in scores))
    by_key = {(score.category, score.decoder): score for score in scores}
    rows = []
    for category in dict.fromkeys(score.category for score in scores):
        row = [by_key[category, name] for name in decoders]
        rows.append([category, *(f"{score.tokens_per_call:.2f}, {_interval(score.speed)}" for score in row)])
    return _table(["tokens per call, speed (AR)", *decoders], rows)


def _accuracy_table(scores: Sequence[Score]) -> str:
    drafting = [score for score in scores if score.accuracy_given_prefix]
    longest = max((len(score.accuracy_given_prefix) for score in drafting), default=0)
    if not longest:
        return ""
    head = ["position", *map(str, range(1, longest + 1))]
    rows = [[score.decoder, *(f"{value:.3f}" for value in score.accuracy_given_prefix)] for score in drafting]
    return _table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])


def _gap_section(gap: AcceptanceGap) -> str:
    head = [
        "all correct up to token",
        *map(str, range(1, len(gap.all_positions) + 1)),
        "mean correct tokens",
    ]
    curves = {
        "held-out windows (validation)": gap.validation,
        "all positions of these texts": gap.all_positions,
        "positions of drafts of speculative decoding": gap.draft_positions,
    }
    rows = [
        [name, *(f"{value:.3f}" for value in curve), f"{sum(curve):.2f}"]
        for name, curve in curves.items()
        if curve is not None
    ]
    by_context = _table(
        ["tokens of context", "all positions", "positions of drafts"],
        [
            [
                f"{bin.first} and more" if bin.last is None else f"{bin.first} to {bin.last}",
                _number(bin.all_positions),
                _number(bin.draft_positions),
            ]
            for bin in gap.by_context
        ],
    )
    title = "### Acceptance gap between validation and decoding"
    return f"{title}\n\n{_table(head, rows)}\n\nMean correct tokens:\n\n{by_context}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(interval: ConfidenceInterval | None) -> str:
    return "" if interval is None else f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
