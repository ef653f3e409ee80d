"""Marked continuations as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ptp_lightning.generation.call_marks import SHADES, MarkedCycle

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tokens by call</title>
<style>
body {{ font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; font-size: 1.05em; }}
.prompt {{ color: #666; }}
.cycle {{ padding: 0.15em 0; border-radius: 0.2em; }}
{shades}
del {{ color: #c0392b; font-size: 0.85em; }}
footer, .cost {{ color: #555; }}
</style>
</head>
<body>
<h1>Tokens by call</h1>
<p>Each shade is one cycle: the tokens that are drafted and verified together. <del>Struck out</del> behind them are
drafts that the base model did not confirm. Grey is the prompt.</p>
{sections}
</body>
</html>
"""


class Section(NamedTuple):
    """A continuation on the page.

    Attributes:
        before: prompt and separator.
        cycles: of the continuation.
        cost: its footer, as text.
    """

    before: str
    cycles: Sequence[MarkedCycle]
    cost: str


def html_page(sections: Sequence[Section]) -> str:
    """The page, without scripts and references to other files."""
    shades = "\n".join(f".shade{number} {{ background: {colour}; }}" for number, colour in enumerate(SHADES))
    return _PAGE.format(shades=shades, sections="\n".join(map(_section, sections)))


def _section(section: Section) -> str:
    # Parsers drop a line break that follows <pre> directly.
    spans = "".join(_span(number, cycle) for number, cycle in enumerate(section.cycles))
    return (
        f'<pre>\n<span class="prompt">{escape(section.before)}</span>{spans}</pre>\n'
        f'<p class="cost">{escape(section.cost)}</p>'
    )


def _span(number: int, cycle: MarkedCycle) -> str:
    """
    >>> _span(3, MarkedCycle("<b>", " x", 2, 1))
    '<span class="cycle shade0" title="cycle 4: 2 tokens in 1 call">&lt;b&gt;</span><del> x</del>'
    """
    calls = f"{cycle.num_calls} call{'' if cycle.num_calls == 1 else 's'}"
    tokens = f"{cycle.num_tokens} token{'' if cycle.num_tokens == 1 else 's'}"
    title = f"cycle {number + 1}: {tokens} in {calls}"
    rejected = f"<del>{escape(cycle.rejected)}</del>" if cycle.rejected else ""
    return f'<span class="cycle shade{number % len(SHADES)}" title="{title}">{escape(cycle.text)}</span>{rejected}'
