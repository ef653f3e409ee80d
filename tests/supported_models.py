"""Write the table of supported families of models: `python -m tests.supported_models`.

Every family in transformers' own registry is tried with a tiny random model, see `check_family`. It takes some minutes.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers import logging as transformers_logging

from tests.helpers.family_checks import FamilyResult, check_family
from tests.helpers.tiny_families import FAMILIES

TABLE = Path(__file__).parents[1] / "docs" / "supported_models.md"
INTRODUCTION = """# Supported families of models

All causal language models that `AutoModelForCausalLM` of transformers {version} builds were tried with tiny random
weights. A family is supported if

* the base model with a closed gate has the logits of the untouched model, bit for bit;
* documents in a packed row have the logits that each has on its own;
* greedy texts of all decoders are those of `transformers.generate`, and sampled ones are what u picks from the logits
  of the base model;
* three training steps run with finite losses.

Any other family is refused when it is loaded, in one line. The check at load runs on the model itself, so it also finds
a member of a supported family whose configuration is not supported.

This page is written by `python -m tests.supported_models`.
"""
ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.MULTILINE)

PLAIN = {
    r",? (which differ )?by \S+ of their standard deviation": "",  # measured
    r": (this type of model is not supported|set predictor\.).*": "",
    r"^expected a base model that takes masks.* found (.* with layers of type .*), which fails.*": r"found \1",
    r"^expected a base model that takes masks.* which fails with (\w+): (.{,70}).*": r"fails with \1: \2",
    r" Incompatible modules.*": "",
    r"^expected ": "",
}
"""Parts of reasons that the table leaves out, and what it says instead; in this order."""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLE)
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {}
    for family in FAMILIES:
        results[family] = check_family(family)
        print(f"{family}: {results[family].status}", flush=True)
    output.write_text(as_page(results, transformers.__version__))


def as_page(results: Mapping[str, FamilyResult], version: str) -> str:
    """The page; `rows_of` reads it.

    Args:
        results: by `model_type`.
        version: of transformers.
    """
    parts = [INTRODUCTION.format(version=version)]
    titles = {
        "supported": ("Supported", "`predictor.lora.target_modules`"),
        "refused": ("Refused", "what was expected and what was found"),
        "not built": ("Not tried, because there is no tiny model", "reason"),
    }
    for status, (title, column) in titles.items():
        rows = {family: result for family, result in results.items() if result.status == status}
        lines = [f"| `{family}` | {as_cell(result)} |" for family, result in sorted(rows.items())]
        parts.append("\n".join([f"## {title}: {len(rows)}\n", f"| model_type | {column} |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def as_cell(result: FamilyResult) -> str:
    """What the table says of a family: target modules, or the reason without measured numbers and advice."""
    if result.status == "supported":
        return f"`[{', '.join(result.target_modules)}]`" if result.target_modules else "any"
    reason = result.reason
    for pattern, replacement in PLAIN.items():
        reason = re.sub(pattern, replacement, reason)
    return reason.replace("|", "\\|").replace("*", "\\*")


def rows_of(page: str) -> dict[str, str]:
    """Cells of all families.

    >>> rows_of(as_page({"llama": FamilyResult("supported")}, "5.0.0"))
    {'llama': 'any'}
    """
    return {family: cell for family, cell in ROW.findall(page)}


def version_of(page: str) -> str:
    """The version of transformers with which a page was written.

    >>> version_of(as_page({}, "5.0.0"))
    '5.0.0'
    """
    found = re.search(r"of transformers (\S+) builds", page)
    assert found is not None, "the introduction names it"
    return found[1]


if __name__ == "__main__":
    main()
