"""Corpora, token series, packing and LightningDataModules."""

from ptp_lightning.data.batch import PackedBatch
from ptp_lightning.data.completions_datamodule import CompletionsDataModule
from ptp_lightning.data.corpus import Corpus, Document, StandardLibrary, TextFiles
from ptp_lightning.data.datamodule import CorpusDataModule
from ptp_lightning.data.hub import HubDataset
from ptp_lightning.data.markov import MarkovSeries
from ptp_lightning.data.pickups import PickUps
from ptp_lightning.data.series import RecordedSeries, Series
from ptp_lightning.data.series_datamodule import SeriesDataModule

__all__ = [
    "CompletionsDataModule",
    "Corpus",
    "CorpusDataModule",
    "Document",
    "HubDataset",
    "MarkovSeries",
    "PackedBatch",
    "PickUps",
    "RecordedSeries",
    "Series",
    "SeriesDataModule",
    "StandardLibrary",
    "TextFiles",
]
