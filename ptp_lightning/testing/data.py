"""The contracts of `RowSource`, `Rendering`, `Corpus` and `Series`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch

from ptp_lightning.data.corpus import Corpus, Split
from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.rendering import Rendering
from ptp_lightning.data.series.series import Series
from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.row_source import BadRowError, RawRow, RowSource
from ptp_lightning.testing.contract import generator, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORLD_SIZES = (1, 2, 3, 5)
NUM_KEYS = 12


def check_row_source(source: RowSource, max_resumes: int = 50) -> None:
    """Check that a source of rows keeps the promises of its base class; it reads the source many times.

    Args:
        source: of a few rows, all of them different.
        max_resumes: number of rows of each shard after which reading is resumed.

    Raises:
        AssertionError: says which promise is broken.

    >>> import tempfile, pathlib
    >>> from ptp_lightning.data import JsonLines
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "rows.jsonl")
    ...     _ = path.write_text('{"text": "a"}\\n{"text": "b"}\\n')
    ...     check_row_source(JsonLines([str(path)]))
    """
    rows = list(source.rows("0", ShardSpec()))
    require(rows, "expected rows, found none")
    for row in rows:
        require(isinstance(source.parse(row), Mapping), f"expected columns by name of {row.name}")
    identities = [row.identity for row in rows]
    require(identities == _identities(source, "0", ShardSpec()), "expected the same order for the same key")
    orders = {tuple(_identities(source, str(key), ShardSpec())) for key in range(NUM_KEYS)}
    require(len({tuple(sorted(order)) for order in orders}) == 1, "expected the same rows for every key")
    for world_size in WORLD_SIZES:
        shards = [list(source.rows("0", ShardSpec(rank, world_size))) for rank in range(world_size)]
        require(
            sorted(row.identity for shard in shards for row in shard) == sorted(identities),
            f"expected {world_size} shards to hold every row once",
        )
        for rank, shard in enumerate(shards):
            _check_resume(source, ShardSpec(rank, world_size), shard, max_resumes)


def _identities(source: RowSource, key: str, shard: ShardSpec) -> list[bytes]:
    return [row.identity for row in source.rows(key, shard)]


def _check_resume(source: RowSource, shard: ShardSpec, rows: list[RawRow], max_resumes: int) -> None:
    for index, row in enumerate(rows[:max_resumes]):
        position = json.loads(json.dumps(row.position))  # as in a checkpoint
        found = [other.identity for other in source.rows("0", shard, position)]
        require(
            found == [other.identity for other in rows[index + 1 :]],
            f"expected the rows after {row.name} when reading resumes at its position, shard {shard}",
        )


def check_rendering(
    rendering: Rendering, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that a rendering keeps the promises of its base class.

    Args:
        rendering: the rendering.
        rows: examples that it can render.
        tokenizer: of a model.

    Raises:
        AssertionError: says which promise is broken.
    """
    rendering.require_tokenizer(tokenizer)
    for row in rows:
        before = dict(row)
        documents = rendering.documents(row, tokenizer)
        require(row == before, "expected the row as before")
        require(rendering.documents(row, tokenizer) == documents, "expected the same documents for the same row")
        require(len(documents) > 0, "expected at least one document of a row, found none")
        for document in documents:
            _check_document(document, tokenizer)
    try:
        rendering.documents({}, tokenizer)
    except BadRowError:
        return
    raise AssertionError("expected a BadRowError for a row without columns, found a document")


def _check_document(document: TokenDocument, tokenizer: PreTrainedTokenizerBase) -> None:
    ids, learned = list(document.token_ids), list(document.completion_mask)
    require(len(ids) == len(learned), f"expected a mask of the {len(ids)} tokens, found one of {len(learned)} entries")
    require(any(learned), "expected tokens to learn, found none")
    require(
        all(isinstance(one, int) and 0 <= one < len(tokenizer) for one in ids),
        f"expected token ids below {len(tokenizer)}, found {ids[:8]}",
    )
    if tokenizer.eos_token_id is not None:
        require(ids[-1] == tokenizer.eos_token_id, "expected the end-of-text token at the end")


def check_corpus(corpus: Corpus) -> None:
    """Check that a corpus keeps the promises of its base class.

    Raises:
        AssertionError: says which one is broken.
    """
    names: dict[str, str] = {}
    for split in get_args(Split):
        documents = list(corpus.documents(split))
        require(list(corpus.documents(split)) == documents, f"expected the documents of {split} in a fixed order")
        for document in documents:
            require(isinstance(document.text, str), f"expected text in {document.name}")
            other = names.setdefault(document.name, split)
            require(other == split, f"expected {document.name} in one split, found it in {other} and {split}")
    require("train" in names.values(), "expected documents of train, found none")


def check_series(series: Series, length: int = 4, count: int = 8) -> None:
    """Check that a series keeps the promises of its base class.

    Args:
        series: the series.
        length: of rows.
        count: number of rows.

    Raises:
        AssertionError: says which promise is broken.

    >>> from ptp_lightning.data import MarkovSeries
    >>> check_series(MarkovSeries())
    """
    for split in get_args(Split):
        draw = series.row_sampler(split, length)
        first, again, other = (draw(count, generator(seed)) for seed in (1, 1, 2))
        fixed = series.fixed_rows(split, length, count)
        for rows in (first, fixed):
            require(
                rows.dtype == torch.int64 and rows.ndim == 2 and rows.shape[1] == length and len(rows) <= count,
                f"expected int64 rows of {length} tokens, at most {count}, found {rows.dtype} of {tuple(rows.shape)}",
            )
            require(
                ((rows >= 0) & (rows < series.vocab_size)).all(),
                f"expected tokens below {series.vocab_size} (vocab_size), found {rows.aminmax()}",
            )
        require(len(first) == count, f"expected {count} rows, found {len(first)}")
        require(torch.equal(first, again), "expected the same rows for the same seed")
        require(split != "train" or not torch.equal(first, other), "expected other rows for another seed")
        require(
            torch.equal(fixed, series.fixed_rows(split, length, count)), "expected the same fixed rows on every call"
        )
