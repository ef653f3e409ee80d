"""Corpora, packing and LightningDataModules."""

from ptp_lightning.data.batch import PackedBatch
from ptp_lightning.data.corpus import Corpus, Document, StandardLibrary, TextFiles
from ptp_lightning.data.datamodule import CorpusDataModule
from ptp_lightning.data.hub import HubDataset

__all__ = ["Corpus", "CorpusDataModule", "Document", "HubDataset", "PackedBatch", "StandardLibrary", "TextFiles"]
