"""Streamed corpora: row sources, mixtures, shuffling, and their data module."""
