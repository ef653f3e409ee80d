"""Streamed corpora: row sources, weighted mixtures, shuffling, and their data module."""
