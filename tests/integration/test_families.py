"""Every family of causal LMs that transformers knows is either supported, or refused in one line when it is loaded."""

from __future__ import annotations

import pytest
import transformers

from tests.helpers.family_checks import check_family
from tests.helpers.tiny_families import FAMILIES, NOT_BUILT, OVERRIDES
from tests.supported_models import TABLE, as_cell, as_page, rows_of, version_of

README = TABLE.parents[1] / "README.md"
REPRESENTATIVES = {
    "exaone4": "sliding windows in some layers; heads are transposed before their norm",
    "cohere2": "scaled logits; layers in parallel",
    "gpt_bigcode": "learned positions; one head of keys",
    "mixtral": "a mixture of experts",
    "gemma2": "capped scores of attention",
    "gpt_oss": "attention sinks",
}
"""Families that stand for their mechanisms in the default suite."""


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_representatives(family: str) -> None:
    assert check_family(family).status == "supported"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    """With the transformers of the table, as the table says; new families pass or are refused as well."""
    result = check_family(family)
    page = TABLE.read_text()
    if transformers.__version__ == version_of(page):
        assert as_cell(result) == rows_of(page)[family]


def test_a_family_that_cannot_be_built_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a new version of transformers must not pass because nobody has looked at it."""
    monkeypatch.delitem(OVERRIDES, "dbrx")
    with pytest.raises(
        AssertionError, match="no tiny model of dbrx: add fields to OVERRIDES .* or a reason to NOT_BUILT"
    ):
        check_family("dbrx")


def test_families_that_are_not_built_exist() -> None:
    assert NOT_BUILT.keys() <= set(FAMILIES) and not NOT_BUILT.keys() & OVERRIDES.keys()


def test_the_table_is_of_this_registry() -> None:
    page = TABLE.read_text()
    if transformers.__version__ != version_of(page):
        pytest.skip(f"the table is of transformers {version_of(page)}")
    assert sorted(rows_of(page)) == FAMILIES, "run python -m tests.supported_models"


def test_the_table_is_written_as_the_command_writes_it() -> None:
    """Introduction, titles and counts are those of the command."""
    page = TABLE.read_text()
    sections = page.split("\n## ")
    assert sections[0] == as_page({}, version_of(page)).split("\n## ")[0]
    for section in sections[1:]:
        title = section.splitlines()[0]
        assert title.endswith(f": {len(rows_of(section))}")
    assert f"[{len(rows_of(sections[1]))} families](docs/supported_models.md)" in README.read_text()
