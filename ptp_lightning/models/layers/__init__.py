"""Decoder layers: memory-efficient ones, activation checkpointing, compilation."""
