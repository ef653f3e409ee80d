"""Layers of the base model as this package runs them."""
