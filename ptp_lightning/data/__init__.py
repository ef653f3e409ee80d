"""Data: corpora, token series, packing, and LightningDataModules of packed batches."""

from ptp_lightning.batch import PackedBatch
from ptp_lightning.data.chat import Chat
from ptp_lightning.data.completions.completions_datamodule import CompletionsDataModule
from ptp_lightning.data.corpus import Corpus, Document, StandardLibrary, TextFiles
from ptp_lightning.data.datamodule import CorpusDataModule
from ptp_lightning.data.packed_datamodule import PackedDataModule
from ptp_lightning.data.packing import TokenDocument
from ptp_lightning.data.rendering import PlainText, PromptAndCompletion, Rendering
from ptp_lightning.data.series.markov import MarkovSeries
from ptp_lightning.data.series.pickups import PickUps
from ptp_lightning.data.series.series import RecordedSeries, Series
from ptp_lightning.data.series.series_datamodule import SeriesDataModule
from ptp_lightning.data.shard_spec import ShardSpec
from ptp_lightning.data.streaming.file_rows import JsonLines, TextRows
from ptp_lightning.data.streaming.hub_rows import HubRows
from ptp_lightning.data.streaming.mixture import StreamPart
from ptp_lightning.data.streaming.row_source import BadRowError, RawRow, RowSource
from ptp_lightning.data.streaming.streaming_corpus import StreamingCorpus

__all__ = [
    "BadRowError",
    "Chat",
    "CompletionsDataModule",
    "Corpus",
    "CorpusDataModule",
    "Document",
    "HubRows",
    "JsonLines",
    "MarkovSeries",
    "PackedBatch",
    "PackedDataModule",
    "PickUps",
    "PlainText",
    "PromptAndCompletion",
    "RawRow",
    "RecordedSeries",
    "Rendering",
    "RowSource",
    "Series",
    "SeriesDataModule",
    "ShardSpec",
    "StandardLibrary",
    "StreamPart",
    "StreamingCorpus",
    "TextFiles",
    "TextRows",
    "TokenDocument",
]
