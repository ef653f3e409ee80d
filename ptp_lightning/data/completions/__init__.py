"""Completions that a teacher wrote earlier, and their data module."""
