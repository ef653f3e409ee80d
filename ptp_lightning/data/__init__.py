"""Corpora, token series, packing and LightningDataModules."""

from ptp_lightning.data.batch import PackedBatch
from ptp_lightning.data.completions_datamodule import CompletionsDataModule
from ptp_lightning.data.corpus import Corpus, Document, StandardLibrary, TextFiles
from ptp_lightning.data.datamodule import CorpusDataModule
from ptp_lightning.data.file_rows import JsonLines, TextRows
from ptp_lightning.data.hub_rows import HubRows
from ptp_lightning.data.markov import MarkovSeries
from ptp_lightning.data.mixture import StreamPart
from ptp_lightning.data.pickups import PickUps
from ptp_lightning.data.rendering import Chat, PlainText, PromptAndCompletion, Rendering
from ptp_lightning.data.row_source import RowSource
from ptp_lightning.data.series import RecordedSeries, Series
from ptp_lightning.data.series_datamodule import SeriesDataModule
from ptp_lightning.data.streaming import StreamingCorpus

__all__ = [
    "Chat",
    "CompletionsDataModule",
    "Corpus",
    "CorpusDataModule",
    "Document",
    "HubRows",
    "JsonLines",
    "MarkovSeries",
    "PackedBatch",
    "PickUps",
    "PlainText",
    "PromptAndCompletion",
    "RecordedSeries",
    "Rendering",
    "RowSource",
    "Series",
    "SeriesDataModule",
    "StandardLibrary",
    "StreamPart",
    "StreamingCorpus",
    "TextFiles",
    "TextRows",
]
