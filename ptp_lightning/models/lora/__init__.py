"""Gated LoRA: adapters that act on slots alone."""
