"""Sphinx builds these pages: `sphinx-build -W -b html docs docs/_build/html`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

# The reference describes the code of this checkout, and nothing is looked up on the network.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "ptp_lightning"
author = "ptp_lightning contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["fieldlist"]

html_theme = "furo"
html_title = "ptp_lightning"
html_copy_source = False
html_show_copyright = False

smartquotes = False
default_role = "code"  # docstrings write `name`, as Markdown does
add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of named tuples are documented once

GENERATED = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", insert_generated)
    app.connect("env-get-outdated", always_generated)


def insert_generated(app: Any, page: str, source: list[str]) -> None:
    """Replace `<!-- generated: NAME -->` by what `generated_reference.py` makes of the code."""
    if GENERATED.search(source[0]):
        from generated_reference import PAGES

        source[0] = GENERATED.sub(lambda found: PAGES[found[1]](), source[0])


def always_generated(app: Any, *_: Any) -> list[str]:
    """Pages that change with the code."""
    return ["reference/command_line", "reference/configuration", "reference/api"]
